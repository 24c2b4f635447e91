"""A dense base in fewer bits: an adapter needs nothing of its linears but their call and their widths.

The packages are not among the development ones; each kind is skipped where its own is missing. What they have in common
is tried without them on a linear as GPTQ's layers look.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from moe_kit import ConfigError, RoutedAdapterConfig, RoutingError, routing_inputs
from moe_kit.adapters.collapse import collapse_to_lora
from moe_kit.adapters.layer import RoutedLayer
from tests.conformance.common import NAME, config, gradients, take_loras, wake
from tests.tiny import batch_of, tiny_llama, tiny_moe, wake_banks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# 4-bit blocks and int8 tiles want widths that they divide
WIDE = dict(width=64, intermediate_size=128)


class QuantLinear(nn.Module):
    """As GPTQ's layers look: codes and scales in buffers, older names of the widths, and no weight."""

    def __init__(self, linear):
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype)).T


def replaced(make):
    """A tiny Llama whose linears are made anew, but for the head."""
    base = tiny_llama(**WIDE).eval()
    for module in list(base.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, make(child))
    return base


def hqq(folder):
    quantize = pytest.importorskip("hqq.core.quantize", reason="needs hqq")
    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    return replaced(lambda linear: quantize.HQQLinear(linear, settings, compute_dtype=torch.float32, device=DEVICE))


def loaded(folder, package, settings):
    pytest.importorskip(package, reason=f"needs {package}")
    tiny_llama(**WIDE).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(), device_map={"": DEVICE})


def nf4(**more):
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **more
    )


def torchao(name):
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, name)())


KINDS = {
    "gptq-like": lambda folder: replaced(QuantLinear),
    "bitsandbytes int8": lambda folder: loaded(folder, "bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes nf4": lambda folder: loaded(folder, "bitsandbytes", nf4),
    "bitsandbytes nf4 double": lambda folder: loaded(
        folder, "bitsandbytes", lambda: nf4(bnb_4bit_use_double_quant=True)
    ),
    "torchao int8": lambda folder: loaded(folder, "torchao", lambda: torchao("Int8WeightOnlyConfig")),
    "torchao int8 dynamic": lambda folder: loaded(
        folder, "torchao", lambda: torchao("Int8DynamicActivationInt8WeightConfig")
    ),
    "hqq 4-bit": hqq,
    "quanto int8": lambda folder: loaded(folder, "optimum.quanto", lambda: QuantoConfig(weights="int8")),
}
# kinds that PEFT's LoRA knows here, to compare with; LoRA has no layer for a class that only looks like GPTQ's
KNOWN_TO_LORA = [kind for kind in KINDS if kind != "gptq-like"]


def batch():
    return {key: value.to(DEVICE) for key, value in batch_of().items()}


@torch.no_grad()
def logits(model):
    return model.eval()(**batch()).logits


@pytest.mark.parametrize("kind", KINDS)
class TestEachKind:
    def test_training(self, kind, tmp_path):
        base = KINDS[kind](tmp_path)
        plain = logits(base)
        # it is another model than the one in full precision
        assert not torch.allclose(plain.cpu(), logits(tiny_llama(**WIDE).to(DEVICE)).cpu(), atol=1e-3)
        model = get_peft_model(base, config(target_modules=TARGETS), adapter_name=NAME)
        assert sum(isinstance(module, RoutedLayer) for module in model.modules()) == 2 * 7
        # bitsandbytes has other kernels with a graph than without
        assert torch.allclose(logits(model), plain, atol=1e-2)
        wake(model)
        model.train()(**batch()).loss.backward()
        found = gradients(model)
        assert found.keys() == {key for key, value in model.named_parameters() if value.requires_grad}
        assert {key.split(".")[-1] for key in found} == {"A", "B", "weight"}
        assert all(value.isfinite().all() and value.abs().max() > 0 for value in found.values())
        assert (logits(model) - plain).abs().max() > 0.1
        with torch.no_grad(), model.disable_adapter():
            assert torch.allclose(logits(model), plain, atol=1e-2)

    def test_saving_generating_unloading(self, kind, tmp_path):
        base = KINDS[kind](tmp_path / "base")
        plain = logits(base)
        model = get_peft_model(base, config(target_modules=TARGETS), adapter_name=NAME)
        wake(model)
        expected = logits(model)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(KINDS[kind](tmp_path / "base"), tmp_path / "adapter" / NAME)
        assert torch.equal(logits(again), expected)
        ids = batch()["input_ids"]
        tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False))
        rows = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, adapter_names=[NAME, "__base__"])
        assert torch.equal(rows[0], tokens[0])
        with pytest.raises(RoutingError, match="collapse_to_lora"):
            model.merge_and_unload()
        assert torch.equal(logits(model.unload()), plain)

    def test_prepared_for_training(self, kind, tmp_path):
        """PEFT's own preparation: norms in float32, gradients into the embedding's output, checkpointing."""
        # reentrant checkpointing, its default, is refused for routers on any base
        settings = {"use_reentrant": False}
        base = prepare_model_for_kbit_training(KINDS[kind](tmp_path), gradient_checkpointing_kwargs=settings)
        model = get_peft_model(base, config(target_modules=TARGETS), adapter_name=NAME)
        wake(model)
        model.train()(**batch()).loss.backward()
        found = gradients(model)
        base.gradient_checkpointing_disable()
        model.zero_grad()
        model(**batch()).loss.backward()
        for key, value in gradients(model).items():
            assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("kind", KNOWN_TO_LORA)
def test_one_expert_is_peft_s_lora(kind, tmp_path):
    plain = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    lora = get_peft_model(KINDS[kind](tmp_path), plain).eval()
    one = RoutedAdapterConfig.from_preset(
        "mixture_of_lora", num_experts=1, top_k=1, r=3, lora_alpha=6, target_modules=TARGETS, losses={}
    )
    model = get_peft_model(KINDS[kind](tmp_path), one).eval()
    take_loras(model, lora)
    torch.testing.assert_close(logits(model), logits(lora), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KNOWN_TO_LORA)
def test_constant_routing_becomes_a_lora(kind, tmp_path):
    tasks = RoutedAdapterConfig.from_preset("poly", num_experts=3, r=2, num_tasks=2, target_modules=TARGETS)
    model = get_peft_model(KINDS[kind](tmp_path), tasks)
    wake_banks(model)
    with routing_inputs(model, task_ids=[1, 1]):
        expected = logits(model)
    lora = collapse_to_lora(model, task_id=1)
    # inputs that are rounded to int8 on the way turn another last bit into another code
    tolerance = 0.1 if "dynamic" in kind else 1e-3
    torch.testing.assert_close(logits(lora), expected, rtol=tolerance, atol=tolerance)


class TestRefused:
    def test_quantised_stacks_of_experts(self):
        base = tiny_moe("Mixtral")
        for name, module in base.named_modules():
            if name.endswith("experts"):
                weight = module.down_proj.detach()
                module.down_proj = nn.Parameter(weight.mul(10).round().to(torch.int8), requires_grad=False)
        with pytest.raises(ConfigError, match=r"MixtralExperts.*quantised"):
            get_peft_model(base, config(target_modules=None, target_parameters=["experts.down_proj"]))

    @pytest.mark.parametrize("targets", ["all-linear", ["up_proj", "o_proj"]], ids=["all", "named"])
    @pytest.mark.parametrize("method", ["fp8", "aqlm", "eetq", "vptq", "compressed-tensors"])
    def test_quantisers_that_were_not_tried(self, method, targets):
        base = replaced(QuantLinear)
        plain = logits(base)
        base.config.quantization_config = {"quant_method": method}
        with pytest.raises(ConfigError, match=rf"is a QuantLinear, quantised by '{method}'.*unquantised"):
            get_peft_model(base, config(target_modules=targets))
        assert not any(isinstance(module, RoutedLayer) for module in base.modules())
        assert torch.equal(logits(base), plain)

    def test_a_linear_that_such_a_quantiser_left_whole(self):
        base = tiny_llama(**WIDE)
        base.config.quantization_config = {"quant_method": "mxfp4"}
        base.model.layers[0].mlp.up_proj = QuantLinear(base.model.layers[0].mlp.up_proj)
        model = get_peft_model(base, config(target_modules=["o_proj"]))
        assert sum(isinstance(module, RoutedLayer) for module in model.modules()) == 2

    def test_layers_of_neural_compressor(self):
        base = tiny_llama(**WIDE)
        made = type("PatchedLinear", (QuantLinear,), {})
        base.model.layers[1].self_attn.o_proj = made(base.model.layers[1].self_attn.o_proj)
        with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.o_proj is a PatchedLinear, quantised by 'inc'"):
            get_peft_model(base, config(target_modules=["o_proj"]))

    @pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear", "LayerNormLinear", "LayerNormMLP"])
    def test_layers_whose_call_is_not_a_linear_s(self, kind):
        # Megatron's give a pair, TransformerEngine's norm their input first
        made = type(kind, (nn.Module,), {"in_features": 64, "out_features": 64, "input_size": 64, "output_size": 64})
        base = tiny_llama(**WIDE)
        base.model.layers[0].self_attn.o_proj = made()
        with pytest.raises(RoutingError, match=f"cannot adapt a {kind}"):
            get_peft_model(base, config(target_modules=["o_proj"]))
