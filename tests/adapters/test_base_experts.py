"""A LoRA on each expert of the base: equal to the naive merged weights, and a PEFT adapter like any other."""

import io

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import nn
from torch.func import functional_call
from transformers.integrations.moe import use_experts_implementation

from moe_kit import ConfigError, RoutedAdapterConfig, RoutingError
from moe_kit.adapters import collapse_to_lora
from moe_kit.adapters.base_experts import AdaptedExperts
from moe_kit.adapters.transfer import copy_experts
from moe_kit.training.inspection import inspect_model, print_inspection
from moe_kit.training.recipe import AdapterConfig
from moe_kit.training.wrapping import adapter_config, wrap_model
from tests.tiny import tiny_moe, wake_banks
from tests.tolerances import assert_close

FAMILIES = ["Mixtral", "Qwen3Moe", "Olmoe", "GptOss"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
NAME = "skills_a"
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def base_of(family, **overrides):
    return tiny_moe(family, **{"vocab_size": 61, **overrides}).eval()


def config_of(**overrides):
    values = dict(r=3, lora_alpha=6, target_parameters=BOTH, task_type="CAUSAL_LM")
    return RoutedAdapterConfig.from_preset("mixture_of_lora", **{**values, **overrides})


def wrap(base, name=NAME, **overrides):
    torch.manual_seed(0)
    model = get_peft_model(base, config_of(**overrides), adapter_name=name)
    wake_banks(model)
    return model.eval()


def layers_of(model):
    return {
        path.removeprefix("base_model.model."): m for path, m in model.named_modules() if isinstance(m, AdaptedExperts)
    }


def naive(model, base, adapters=(NAME,)):
    """Weights of the plain model with `W_e + (alpha / r) B_e A_e` written out, differentiable in A and B."""
    weights = {}
    for path, layer in layers_of(model).items():
        for adapter in adapters:
            for name, lora in layer.moe_adapter_bank[adapter].items():
                delta = torch.stack([2.0 * lora.B[e] @ lora.A[e] for e in range(lora.A.shape[0])])
                plain = weights.get(f"{path}.{name}", base.get_parameter(f"{path}.{name}").detach())
                stored_transposed = layer.base_layer.is_transposed
                weights[f"{path}.{name}"] = plain + (delta.transpose(1, 2) if stored_transposed else delta)
    return weights


def expected_logits(model, base, ids=IDS, adapters=(NAME,)):
    base.set_experts_implementation("eager")
    return functional_call(base, naive(model, base, adapters), kwargs={"input_ids": ids}).logits


def grads(model, logits):
    model.zero_grad()
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "up", "down"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_lora_of_each_expert(family, targets):
    base = base_of(family)
    fresh = base(IDS).logits
    model = get_peft_model(base_of(family), config_of(target_parameters=targets), adapter_name=NAME).eval()
    assert_close("fresh", model(IDS).logits, fresh)
    wake_banks(model)
    logits = model(IDS).logits
    assert (logits - fresh).abs().max() > 1e-2
    expected = expected_logits(model, base)
    assert_close("logits", logits, expected)
    actual, wanted = grads(model, logits), grads(model, expected)
    assert len(wanted) == 2 * 2 * len(targets)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.abs().max() > 0
        assert_close(f"gradient of {name}", actual[name], value)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_only_the_loras_are_trained_and_saved(family, tmp_path):
    model = wrap(base_of(family))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".moe_adapter_bank.skills_a." in name for name in trained)
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(family), tmp_path / NAME).eval()
    assert torch.equal(loaded(IDS).logits, logits)
    native = base_of(family)
    native.load_adapter(str(tmp_path / NAME), adapter_name="native")
    assert torch.equal(native.eval()(IDS).logits, logits)
    assert loaded.peft_config["default"].target_modules == []


def test_an_expert_without_tokens_has_gradient_zero():
    model = wrap(base_of("Olmoe"))
    ids = torch.tensor([[5]])
    found = grads(model, model(ids).logits)
    for name, value in found.items():
        used = value.flatten(1).abs().amax(1) > 0
        assert used.sum() == 2, name


def test_disabled_and_unloaded_it_is_the_base():
    base = base_of("Mixtral")
    expected = base(IDS).logits
    model = wrap(base_of("Mixtral"))
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    plain = model.unload()
    assert torch.equal(plain(IDS).logits, expected)
    assert not layers_of(plain)


def test_two_adapters_add_up():
    base = base_of("GptOss")
    model = wrap(base_of("GptOss"))
    model.add_adapter("skills_b", config_of(target_parameters=BOTH[1:]))
    wake_banks(model)
    one = model(IDS).logits
    assert_close("first alone", one, expected_logits(model, base))
    model.base_model.set_adapter([NAME, "skills_b"])
    assert_close("both", model(IDS).logits, expected_logits(model, base, adapters=(NAME, "skills_b")))
    model.base_model.set_adapter("skills_b")
    model.delete_adapter("skills_b")
    model.set_adapter(NAME)
    assert torch.equal(model(IDS).logits, one)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_merges_since_each_lora_is_constant(family):
    model = wrap(base_of(family))
    logits = model(IDS).logits
    model.merge_adapter()
    assert_close("merged", model(IDS).logits, logits)
    model.unmerge_adapter()
    assert_close("unmerged", model(IDS).logits, logits)
    plain = model.merge_and_unload(safe_merge=True)
    assert not layers_of(plain)
    assert_close("merged for good", plain(IDS).logits, logits)


def test_a_merge_that_would_not_be_finite_is_refused():
    base = base_of("Mixtral")
    model = wrap(base)
    before = {name: value.clone() for name, value in base.named_parameters() if "base_layer" in name}
    with torch.no_grad():
        next(iter(layers_of(model).values())).moe_adapter_bank[NAME]["down_proj"].B[2, 0, 0] = torch.inf
    with pytest.raises(RoutingError, match="expert 2"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(value, before[name]) for name, value in base.named_parameters() if name in before)


def test_with_routed_linears_nothing_is_merged():
    base = base_of("Mixtral")
    # the last linear that PEFT comes to is a routed one, behind all experts
    model = wrap(base, target_modules=["model.layers.1.self_attn.q_proj"], num_experts=3)
    before = [value.clone() for value in base.parameters()]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RoutingError, match="cannot be merged"):
            merge()
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before, strict=True))
    with pytest.raises(RoutingError, match="adapter of their own"):
        collapse_to_lora(model, weights="mean")


def test_linears_and_experts_in_one_adapter_learn(tmp_path):
    model = wrap(base_of("Qwen3Moe"), target_modules="all-linear", num_experts=3).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of("Qwen3Moe"), tmp_path / NAME).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("error:The following rank_pattern")
def test_ranks_scales_and_layers():
    model = wrap(base_of("Mixtral"), layers_to_transform=[1], rank_pattern={"down_proj": 5}, use_rslora=True)
    assert list(layers_of(model)) == ["model.layers.1.mlp.experts"]
    bank = layers_of(model)["model.layers.1.mlp.experts"].moe_adapter_bank[NAME]
    assert bank["gate_up_proj"].A.shape == (4, 3, 32)
    assert bank["down_proj"].B.shape == (4, 32, 5)
    assert bank["down_proj"].scale == pytest.approx(6 / 5**0.5)


def test_dropout_acts_on_the_loras_only():
    model = wrap(base_of("Mixtral"), dropout=0.5)
    base = base_of("Mixtral")
    assert_close("evaluation", model(IDS).logits, expected_logits(model, base))
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        for layer in layers_of(model).values():
            for lora in layer.moe_adapter_bank[NAME].values():
                lora.B.zero_()
    assert_close("base untouched", model(IDS).logits, base(IDS).logits)


def test_half_precision_base_keeps_wide_loras():
    model = wrap(base_of("GptOss").to(torch.bfloat16))
    logits = model(IDS).logits
    assert logits.dtype is torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    wide = base_of("GptOss")
    expected = expected_logits(model, wide)
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_generation_equals_the_merged_model():
    model = wrap(base_of("Olmoe"))
    prompt = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    one = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(one, model.merge_and_unload().generate(**prompt, max_new_tokens=6, do_sample=False))


def test_gradient_checkpointing_changes_no_gradient():
    model = wrap(base_of("GptOss")).train()
    expected = grads(model, model(IDS).logits)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    actual = grads(model, model(IDS).logits)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_compiles_in_one_graph(family):
    model = wrap(base_of(family))
    expected = grads(model, model(IDS).logits)
    torch._dynamo.reset()
    actual = grads(model, torch.compile(model, backend="eager", fullgraph=True)(IDS).logits)
    for name, value in expected.items():
        assert_close(f"gradient of {name}", actual[name], value)


def test_experts_can_be_copied_between_adapters():
    model = wrap(base_of("Mixtral"))
    logits = model(IDS).logits
    model.add_adapter("skills_b", config_of())
    copy_experts(model, NAME, "skills_b")
    model.set_adapter("skills_b")
    assert torch.equal(model(IDS).logits, logits)


@use_experts_implementation(is_transposed=True, has_gate=False, has_post_expert_norm=True)
class PlainExperts(nn.Module):
    """No gate, stored [E, in, out] without biases, a norm behind each expert."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 5, 7))
        self.down_proj = nn.Parameter(torch.randn(3, 7, 5))
        self.act_fn = nn.ReLU()
        self.post_expert_norm = nn.LayerNorm(5)
        nn.init.normal_(self.post_expert_norm.bias)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, slot in torch.cartesian_prod(*map(torch.arange, top_k_index.shape)):
            expert = top_k_index[token, slot]
            if expert < 3:
                hidden = self.act_fn(hidden_states[token] @ self.up_proj[expert]) @ self.down_proj[expert]
                out[token] += top_k_weights[token, slot] * self.post_expert_norm(hidden)
        return out


def test_experts_without_gate_and_empty_slots():
    torch.manual_seed(0)
    module = PlainExperts(transformers.PretrainedConfig(_experts_implementation="eager"))
    layer = AdaptedExperts(module, "block.experts")
    layer.update_layer(NAME, config_of(target_parameters=["up_proj", "down_proj"]), ["up_proj", "down_proj"])
    layer.set_adapter(NAME)
    for lora in layer.moe_adapter_bank[NAME].values():
        nn.init.normal_(lora.B)
    x, weights = torch.randn(4, 5), torch.rand(4, 2)
    ids = torch.tensor([[0, 2], [1, 3], [3, 3], [2, 0]])
    actual = layer(x, ids, weights)
    assert actual[2].abs().max() == 0
    layer.merge()
    assert_close("merged", layer(x, ids, weights), actual)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["experts.gate_up_prj"], "Did you mean 'experts.gate_up_proj'"),
        (["experts.down_proj", "mlp.gate.weight"], "'mlp.gate.weight', which is no stacked"),
        (["layers.7.mlp.experts.down_proj"], "experts.down_proj, experts.gate_up_proj"),
        ("experts.down_proj", "expected a list"),
        ([], "expected a list"),
        ([3], "expected a list"),
    ],
)
def test_a_name_that_fits_nothing_is_an_error(targets, message):
    base = base_of("Mixtral")
    with pytest.raises(ConfigError, match=message):
        wrap(base, target_parameters=targets)
    assert not layers_of(base)


def test_other_refusals(tmp_path):
    from tests.tiny import tiny_llama

    with pytest.raises(ConfigError, match="Such weights: none"):
        wrap(tiny_llama())
    with pytest.raises(ConfigError, match="no experts there"):
        wrap(base_of("Mixtral"), layers_to_transform=[5])
    with pytest.raises(ConfigError, match="two adapters"):
        config_of(from_adapters=[str(tmp_path)])
    lora = get_peft_model(base_of("Mixtral"), LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    with pytest.raises(ConfigError, match="another method"):
        wrap(lora.get_base_model())


def test_lora_on_linears_beside_it():
    """PEFT's own methods go on the linears of the same model."""
    base = base_of("Mixtral")
    base.add_adapter(config_of(), NAME)
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "plain")
    wake_banks(base)
    base.set_adapter([NAME, "plain"])
    both = base.eval()(IDS).logits
    base.set_adapter([NAME])
    one = base(IDS).logits
    assert_close("experts alone", one, expected_logits(base, base_of("Mixtral")))
    assert not torch.allclose(one, both, atol=1e-3)


def test_only_when_asked(caplog):
    model = get_peft_model(base_of("Mixtral"), config_of(target_parameters=None, target_modules="all-linear"))
    assert not layers_of(model)
    assert "target_parameters adapts its experts" in caplog.text


def test_inspection_counts_what_a_token_meets():
    found = inspect_model(wrap(base_of("Qwen3Moe"), target_modules=["q_proj"], num_experts=4, top_k=2), NAME)
    stacks = {m.path: m for m in found.modules if "experts" in m.path}
    assert len(stacks) == 4
    up = stacks["model.layers.0.mlp.experts.gate_up_proj"]
    assert (up.width_in, up.width_out, up.experts, up.active, up.router) == (32, 48, 6, 3, None)
    assert up.parameters == 6 * 3 * (32 + 48)
    assert up.active_parameters == 3 * 3 * (32 + 48)
    # q 32, k and v 16 wide each, o, three of six experts of width 24, and the head
    linears = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * (48 * 32 + 24 * 32)
    assert found.base_flops == 2 * (2 * linears + 61 * 32)
    console = Console(width=100, record=True, file=io.StringIO())
    print_inspection(found, console)
    assert "6 adapted weights" in console.export_text()


def test_a_recipe_asks_for_them_alone_or_beside_upper_linears():
    base = base_of("Mixtral")
    alone = AdapterConfig(settings={"target_parameters": BOTH, "r": 2})
    assert adapter_config(base, alone).target_modules is None
    both = AdapterConfig(upper_layers=1, settings={"target_modules": "all-linear", "target_parameters": BOTH, "r": 2})
    model = wrap_model(base, both)
    adapted = [path for path, module in model.named_modules() if hasattr(module, "moe_adapter_bank")]
    assert {path.rpartition(".")[2] for path in adapted} == {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}
    assert all(".layers.1." in path for path in adapted)
