"""A step of decoding looks a group's tensors up once; it must notice everything that makes what it knows wrong."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model

from moe_kit import RoutedAdapterConfig
from moe_kit.adapters.layer import RoutedLayer
from tests.tiny import tiny_llama
from tests.tolerances import assert_close

# two, since the queries and keys of a single token do not matter
TOKENS = torch.tensor([[5, 7]])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(autouse=True)
def always_decode(monkeypatch):
    """At a tiny model's widths the cost model would take all experts at once."""
    from moe_kit_kernels.lora_experts import dispatch

    monkeypatch.setattr(dispatch, "chosen_form", lambda *sizes, training, **_: "dense" if training else "decode")


def adapted(**options):
    torch.manual_seed(0)
    settings = {"num_experts": 4, "top_k": 2, "r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(tiny_llama(), RoutedAdapterConfig.from_preset("mixture_of_lora", **settings)).eval()
    for name, value in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(value, std=0.3)
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


def has_steps(model):
    return any(step is not None for layer in layers(model) for step in layer.steps.values())


@torch.no_grad()
def few_tokens(model):
    return model(input_ids=TOKENS).logits


def with_gradients(model):
    """The same numbers by the general path, which builds a graph."""
    with torch.enable_grad():
        return model(input_ids=TOKENS).logits.detach()


def warm(model):
    few_tokens(model)
    assert has_steps(model)
    return model


def test_equals_the_general_path():
    model = warm(adapted())
    assert_close("logits", few_tokens(model), with_gradients(model))


def test_outlives_a_prompt(monkeypatch):
    from moe_kit_kernels.lora_experts import dispatch

    monkeypatch.setattr(
        dispatch, "chosen_form", lambda x, *sizes, training, **_: "dense" if training or len(x) > 2 else "decode"
    )
    model = warm(adapted())
    steps = [dict(layer.steps) for layer in layers(model)]
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    few_tokens(model)
    assert [dict(layer.steps) for layer in layers(model)] == steps


def hook_on_base(model):
    layers(model)[1].base_layer.register_forward_hook(lambda module, args, output: output + 1)


def hook_on_sibling(model):
    layers(model)[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replaced_weight(model):
    base = layers(model)[0].base_layer
    base.weight = torch.nn.Parameter(base.weight * 2, requires_grad=False)


def weight_in_place(model):
    layers(model)[0].base_layer.weight.data.mul_(2)


def expert_in_place(model):
    layers(model)[1].moe_adapter_bank["default"].B.data.mul_(2)


def expert_of_other_storage(model):
    bank = layers(model)[1].moe_adapter_bank["default"]
    bank.B.data = bank.B.data * 2


def scale(model):
    layers(model)[0].moe_adapter_bank["default"].scale *= 2


def cast(model):
    model.double()


def disabled_sibling(model):
    layers(model)[1]._disable_adapters = True


def loaded(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)


CHANGES = [
    hook_on_base,
    hook_on_sibling,
    replaced_weight,
    weight_in_place,
    expert_in_place,
    expert_of_other_storage,
    scale,
    cast,
    disabled_sibling,
    loaded,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_notices(change):
    """What a warm model computes after a change is what a cold one computes, and differs from before."""
    model, cold = warm(adapted()), adapted()
    before = few_tokens(model)
    for each in (model, cold):
        change(each)
    # routing weights stay float32 in a model of any dtype
    assert_close("logits", few_tokens(model), with_gradients(cold), torch.float32)
    assert not torch.equal(few_tokens(model), before)


def test_switched_adapter():
    model = warm(adapted())
    torch.manual_seed(1)
    model.add_adapter("other", RoutedAdapterConfig.from_preset("remix", num_experts=3, r=2, target_modules=TARGETS))
    model.set_adapter("other")
    other = few_tokens(model)
    assert_close("other", other, with_gradients(model))
    model.set_adapter("default")
    assert_close("default", few_tokens(model), with_gradients(model))
    assert not torch.equal(few_tokens(model), other)


def test_forced_and_recorded_decisions_hold():
    from moe_kit import force_experts, record_routing

    model = warm(adapted())
    with force_experts(model, torch.tensor([[3, 1]])), record_routing(model) as record:
        forced = few_tokens(model)
    assert all(ids.tolist() == [[3, 1]] * 2 for ids in record.values())
    with force_experts(model, torch.tensor([[3, 1]])):
        assert_close("logits", forced, with_gradients(model))


def test_a_copy_looks_up_anew():
    model = warm(adapted())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not has_steps(twin)
        layers(twin)[0].base_layer.weight.data.mul_(2)
        assert_close("twin", few_tokens(twin), with_gradients(twin))
    assert_close("model", few_tokens(model), with_gradients(model))


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"router_sharing": "none"}, {"router_sharing": "model"}])
def test_other_arrangements(options):
    model = adapted(**options)
    few_tokens(model)
    assert_close("logits", few_tokens(model), with_gradients(model))
    if options.get("router_sharing") == "none":
        assert has_steps(model)
