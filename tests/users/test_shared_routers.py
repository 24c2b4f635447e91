"""Routers shared by a block or the model: the layer that runs first decides; inputs are the same whoever hands them on."""

import pytest
import torch
import transformers as T
from peft import get_peft_model
from torch import nn

from moe_kit import RoutedAdapterConfig, RoutingError, record_routing
from moe_kit.routing.context import InputIdentity
from tests.tiny import batch_of, tiny_llama
from tests.users.test_two_passes import wake

SMALL = dict(vocab_size=61, pad_token_id=0)
FAMILIES = {
    # both register the key before the query, which runs first
    "OPT": lambda: T.OPTForCausalLM(
        T.OPTConfig(
            **SMALL, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
            max_position_embeddings=32,
        )
    ),
    "GPT-J": lambda: T.GPTJForCausalLM(
        T.GPTJConfig(**SMALL, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=32, n_inner=24)
    ),
}  # fmt: skip


def wrap(base, **options):
    values = dict(num_experts=4, top_k=2, r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    config = RoutedAdapterConfig.from_preset("mixture_of_lora", **{**values, **options})
    return wake(get_peft_model(base.eval(), config)).eval()


@pytest.mark.parametrize("sharing", ["block", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_to_run_decides(family, sharing):
    model = wrap(FAMILIES[family](), router_sharing=sharing)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("q_proj") and "layers.0." in name.replace(".h.0.", ".layers.0."):
            module.register_forward_pre_hook(lambda module, args: seen.setdefault("x", args[0]))
    with record_routing(model) as record, torch.no_grad():
        model(**batch_of())
    assert len(record) == (1 if sharing == "model" else 2)
    owner = next(module for module in model.modules() if getattr(module, "moe_adapter_router", None))
    router = owner.moe_adapter_router["default"]
    ids = router.scorer.weight @ seen["x"].flatten(0, 1).T
    first = next(iter(record.values()))
    assert torch.equal(first.sort(-1).values, ids.T.topk(2).indices.sort(-1).values)


@pytest.mark.parametrize("sharing", ["block", "model"])
def test_a_block_that_runs_twice_decides_twice(sharing):
    config = T.AlbertConfig(
        vocab_size=61, embedding_size=16, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, pad_token_id=0,
    )  # fmt: skip
    base = T.AlbertForMaskedLM(config)
    model = wrap(base, router_sharing=sharing, target_modules=["query", "value", "ffn"], task_type=None)
    decided = []
    router = next(m for m in model.modules() if getattr(m, "moe_adapter_router", None)).moe_adapter_router["default"]
    router.register_forward_hook(lambda module, args, routing: decided.append(routing))
    batch = batch_of()
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert len(decided) == 3


def test_a_first_layer_of_another_width_is_named():
    base = nn.ModuleDict({"late": nn.Linear(8, 4), "early": nn.Linear(6, 8)})
    base.forward = lambda x: base["late"](base["early"](x))
    model = get_peft_model(
        base,
        RoutedAdapterConfig.from_preset(
            "mixture_of_lora", num_experts=3, r=2, target_modules=["early", "late"], router_sharing="model"
        ),
    )
    with pytest.raises(RoutingError, match="early runs first"):
        model.base_model.model["late"](model.base_model.model["early"](torch.randn(2, 6)))


def view_of_input(module, args):
    x = args[0]
    return (x.view_as(x), *args[1:])


@pytest.mark.parametrize("hooked", [["k_proj"], ["q_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_hooks_that_hand_on_a_view(hooked):
    """A sampled decision shows it: q, k and v must use the same draw."""
    options = dict(target_modules=["q_proj", "k_proj", "v_proj"], num_experts=4, r=3, task_type="CAUSAL_LM")
    config = RoutedAdapterConfig.from_preset("remix", top_k=2, **options)
    model = wake(get_peft_model(tiny_llama(), config)).train()
    calls = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in hooked:
            module.register_forward_pre_hook(view_of_input)
        if name.endswith("moe_adapter_router.default"):
            module.register_forward_hook(lambda module, args, routing: calls.append(module))
    with moe_kit_policy(model):
        model(input_ids=batch_of()["input_ids"])
    assert len(calls) == 2, "one decision a layer"


def moe_kit_policy(model):
    from moe_kit.routing import policy_gradient

    return policy_gradient(model)


def test_identity_of_inputs():
    x = torch.randn(3, 4)
    seen = InputIdentity(x)
    assert seen.is_of(x)
    assert seen.is_of(x.view_as(x))
    assert not seen.is_of(x.clone())
    assert not seen.is_of(x[:2])
    assert not seen.is_of(x.T)
    x.add_(1)
    assert not seen.is_of(x), "changed in between"
    # memory that went to another tensor
    gone = InputIdentity(torch.randn(3, 4))
    assert not any(gone.is_of(torch.randn(3, 4)) for _ in range(50))
    with torch.inference_mode():
        y = torch.randn(3, 4)
        assert InputIdentity(y).is_of(y)
