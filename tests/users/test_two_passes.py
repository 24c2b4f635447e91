"""Several forward passes before one backward pass, with and without gradient checkpointing (DPO, KTO, contrastive losses)."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_kit import LayerRoutingConfig, RoutedAdapterConfig, RoutingError
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.state import require_routing_state
from tests.tiny import batch_of, tiny_llama

TARGETS = ["q_proj", "v_proj", "up_proj"]
ROUTED = {
    "token": {},
    "sequence": dict(scope="sequence"),
    "request": dict(scope="request"),
    "block": dict(router_sharing="block"),
    "model": dict(router_sharing="model"),
    "noisy": dict(score="noisy_linear"),
    "expert choice": dict(select="expert_choice", capacity_factor=2.0, causal_leak="allow"),
}


def routed(**options):
    config = dict(num_experts=4, top_k=2, r=3, target_modules=TARGETS, task_type="CAUSAL_LM")
    if options.get("select") == "expert_choice":
        del config["top_k"]
        options = {"causal_leak": "allow"}
        return RoutedAdapterConfig.from_preset("expert_choice", **config, **options)
    return RoutedAdapterConfig.from_preset("mixture_of_lora", **config, **options)


def wake(model):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".B") or "lora_B" in name or "moe_adapter_router" in name or "moe_depth" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
    return model


def two_batches():
    """Other rows, other lengths, other padding, other prompts."""
    one, two = batch_of(rows=2, length=6), batch_of(rows=3, length=9)
    one["attention_mask"][1, 4:] = 0
    one["labels"][:, :2] = -100
    two["attention_mask"][0, 5:] = 0
    two["labels"][:, :4] = -100
    for batch in (one, two):
        batch["labels"][batch["attention_mask"] == 0] = -100
    return one, two


def gradients(config, checkpointing, use_reentrant=False):
    """Of one backward pass through two forward passes, with a pass of nothing in between."""
    model = wake(get_peft_model(tiny_llama(layers=3), config)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    one, two = two_batches()
    torch.manual_seed(5)
    loss = model(**one, use_cache=False).loss
    with torch.no_grad():
        model(**batch_of(rows=1, length=4), use_cache=False)
    loss = loss + 2 * model(**two, use_cache=False).loss
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys() != set()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("options", ROUTED.values(), ids=ROUTED.keys())
def test_recomputation_keeps_to_its_own_pass(options):
    assert_same(gradients(routed(**options), True), gradients(routed(**options), False))


def test_lora_is_the_control():
    config = LoraConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM")
    assert_same(gradients(config, True), gradients(config, False))


def test_reentrant_checkpointing_keeps_to_its_own_pass():
    config = routed(scope="sequence", losses={})
    assert_same(gradients(config, True, use_reentrant=True), gradients(config, False))


@pytest.mark.parametrize("preset", ["first", "informed", "flexi", "mod"])
def test_layer_routers_keep_to_their_own_pass(preset):
    config = LayerRoutingConfig.from_preset(preset, task_type="CAUSAL_LM")
    assert_same(gradients(config, True), gradients(config, False))


def held(state):
    return [known for known in (reference() for reference in state.log._passes) if known is not None]


def test_a_graph_holds_its_pass_and_nothing_else_does():
    model = wake(get_peft_model(tiny_llama(), routed(scope="sequence"))).train()
    state = require_routing_state(model)
    losses = [model(**batch, use_cache=False).loss for batch in two_batches()]
    assert [known.context.registered for known in held(state)] == [[], []]
    losses.clear()
    model(**batch_of(), use_cache=False)
    assert not held(state), "nobody kept the output"


LEAKS = {
    "hidden states, block": (lambda: tiny_llama(), routed(router_sharing="block")),
    "hidden states, model": (lambda: tiny_llama(), routed(router_sharing="model")),
    "hidden states, input": (lambda: tiny_llama(), routed()),
    **{
        f"hidden states, {preset}": (
            lambda: tiny_llama(layers=4),
            LayerRoutingConfig.from_preset(preset, task_type="CAUSAL_LM"),
        )
        for preset in ("first", "flexi", "mod")
    },
}


@pytest.mark.parametrize(("base", "config"), LEAKS.values(), ids=LEAKS.keys())
@pytest.mark.parametrize("backward", [True, False])
def test_an_output_below_a_router_keeps_nothing_alive(base, config, backward):
    """A hidden state that holds its pass must not be held by the decisions above it."""
    model = wake(get_peft_model(base(), copy.deepcopy(config))).train()
    counts = []
    for _ in range(4):
        output = model(**batch_of(), use_cache=False, output_hidden_states=True)
        if backward:
            output.loss.backward()
        del output
        gc.collect()
        counts.append(sum(isinstance(thing, (RoutingContext, torch.Tensor)) for thing in gc.get_objects()))
    assert counts[-1] <= counts[1], counts
    router = weakref.ref(next(module for name, module in model.named_modules() if name.endswith("_router.default")))
    del model
    gc.collect()
    assert router() is None


def test_a_pass_whose_output_is_gone_is_refused():
    """What a hook took from inside a pass outlives the output that holds it."""
    model = wake(get_peft_model(tiny_llama(), routed(scope="sequence"))).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    taken = []
    layer = model.base_model.model.model.layers[0]
    handle = layer.register_forward_hook(lambda module, args, output: taken.append(output))
    model(**batch_of(), use_cache=False)
    handle.remove()
    model(**batch_of(), use_cache=False)
    hidden = taken[0] if isinstance(taken[0], torch.Tensor) else taken[0][0]
    with pytest.raises(RoutingError, match="keep the output"):
        hidden.sum().backward()
