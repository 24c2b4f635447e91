"""Decisions: pooling, padding, budgets, losses; and that they ride on the cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch.nn import functional

from moe_kit import ConfigError, record_routing, replay_routing, routing_inputs, routing_losses
from moe_kit.depth import LayerRoutingConfig, force_layers, layer_applications, set_budget
from moe_kit.depth.losses import class_weights, focal_loss
from moe_kit.depth.routers import ActionRouter, choose, evenly_spaced, pooled_logits
from moe_kit.depth.windows import Windows, window_matrix
from tests.depth.families import LAYERS, padded_batch, tiny

GREEDY = dict(max_new_tokens=6, do_sample=False)
SEQUENCE = ("dr_llm", "first", "static", "random")
PRESETS = LayerRoutingConfig.presets()


def scramble(model, seed=0, scale=0.7):
    """Give routers and forecasters weights that make them decide differently by input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".action"):
                continue
            if "moe_depth_router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif "moe_depth_forecaster" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def routed(preset="dr_llm", family="llama", attention="sdpa", **overrides):
    model = get_peft_model(tiny(family, attention), LayerRoutingConfig.from_preset(preset, **overrides)).eval()
    return scramble(model)


@given(length=st.integers(1, 40), pad=st.integers(0, 5), windows=st.integers(1, 8), left=st.booleans())
@settings(max_examples=60, deadline=None)
def test_windows_are_those_of_the_real_prompt(length, pad, windows, left):
    x = torch.randn(length, 3)
    count = min(windows, length)
    size = length // count
    expected = torch.stack([x[i * size : (i + 1) * size].mean(0) for i in range(count)])
    mask = torch.zeros(1, length + pad, dtype=torch.bool)
    padded = torch.randn(1, length + pad, 3)
    place = slice(pad, None) if left else slice(0, length)
    mask[0, place], padded[0, place] = True, x
    matrix, weight = window_matrix(mask, windows)
    torch.testing.assert_close((matrix @ padded)[0, :count], expected, rtol=1e-5, atol=1e-5)
    assert weight[0].tolist() == pytest.approx([1 / count] * count + [0] * (windows - count))


@given(length=st.integers(1, 40), count=st.integers(1, 9), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_windows_without_padding_are_those_with_it(length, count, dtype):
    x = torch.randn(2, length, 3, dtype=dtype)
    padded = torch.cat([torch.randn(2, 2, 3, dtype=dtype), x], 1)
    mask = (torch.arange(length + 2) >= 2).expand(2, -1)
    views, matrix = Windows(mask[:, 2:], count), Windows(mask, count)
    used = views.means(x).shape[1]
    assert used == min(count, length)
    torch.testing.assert_close(views.means(x), matrix.means(padded)[:, :used], rtol=1e-5, atol=1e-5)
    logits = torch.randn(2, count, 4)
    torch.testing.assert_close(views.average(logits[:, :used]), matrix.average(logits), rtol=1e-5, atol=1e-6)


def test_logits_are_averaged_not_inputs():
    config = LayerRoutingConfig(windows=2)
    router = ActionRouter(config, 4)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 4, 4)
    mask = torch.ones(1, 4, dtype=torch.bool)
    actual = pooled_logits(router, x, mask, "windows", Windows(mask, 2))
    halves = torch.stack([router.scorer(x[:, :2].mean(1)), router.scorer(x[:, 2:].mean(1))])
    torch.testing.assert_close(actual, halves.mean(0))
    assert not torch.allclose(actual, router.scorer(x.mean(1)))


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("static", "random")])
@torch.no_grad()
def test_a_fresh_preset_executes_everything(preset):
    base, batch = tiny(), padded_batch()
    expected, text = base(**batch).logits, base.generate(**batch, **GREEDY)
    model = get_peft_model(base, LayerRoutingConfig.from_preset(preset)).eval()
    assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(layer_applications(model).float(), torch.ones(2, LAYERS))
    assert torch.equal(model.generate(**batch, **GREEDY), text)


@pytest.mark.parametrize("preset", SEQUENCE)
@torch.no_grad()
def test_decision_ignores_padding_later_tokens_and_batch_mates(preset):
    model = routed(preset, **({"budget": 0.5} if preset in ("static", "random") else {}))
    lengths = (9, 5, 12, 7)
    batch = padded_batch(lengths)
    model.generate(**batch, **GREEDY)
    together = layer_applications(model)
    assert (together != 1).any(), "the routers here never do anything"
    for row, length in enumerate(lengths):
        for pad in (0, 3):
            ids = batch["input_ids"][row : row + 1, 12 - length :]
            ids = functional.pad(ids, (pad, 0))
            mask = (torch.arange(length + pad) >= pad).long()[None]
            model(input_ids=ids, attention_mask=mask)
            assert torch.equal(layer_applications(model), together[row : row + 1])


@pytest.mark.parametrize("preset", SEQUENCE)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_decisions_ride_on_every_cache(preset, family):
    model = routed(preset, family)
    batch = padded_batch((12, 7, 9))
    expected = model.generate(**batch, **GREEDY, use_cache=False)
    routes = layer_applications(model)
    for options in ({}, dict(cache_implementation="static"), dict(num_beams=1)):
        assert torch.equal(model.generate(**batch, **GREEDY, **options), expected)
        assert torch.equal(layer_applications(model), routes)
    beams = dict(num_beams=3, **GREEDY)
    assert torch.equal(model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False))


@torch.no_grad()
def test_chunked_prefill_decides_on_the_first_chunk():
    model = routed()
    batch = padded_batch((12,))
    chunked = model.generate(**batch, **GREEDY, prefill_chunk_size=5)
    routes = layer_applications(model)
    model(batch["input_ids"][:, :5])
    assert torch.equal(layer_applications(model), routes)
    with force_layers(model, routes):
        assert torch.equal(model.generate(**batch, **GREEDY), chunked)


@torch.no_grad()
def test_assisted_decoding_decides_on_the_prompt_alone():
    model, assistant = routed(), tiny(seed=3)
    for seed in range(4):
        batch = padded_batch((15,), seed=seed)  # one candidate more and the windows double
        expected = model.generate(**batch, **GREEDY)
        routes = layer_applications(model)
        for options in (dict(assistant_model=assistant), dict(prompt_lookup_num_tokens=3)):
            assert torch.equal(model.generate(**batch, **GREEDY, **options), expected)
            assert torch.equal(layer_applications(model), routes)


@torch.no_grad()
def test_prompt_is_given_or_read_from_labels():
    model = routed()
    batch = padded_batch((12, 8))
    short = {name: value[:, :9] for name, value in batch.items()}  # prompts of 9 and 5 tokens
    model(**short)
    expected = layer_applications(model)
    model(**batch)
    assert not torch.equal(layer_applications(model), expected)
    with routing_inputs(model, prompt_length=torch.tensor([9, 5])):
        model(**batch)
        assert torch.equal(layer_applications(model), expected)
    prompt = torch.zeros(2, 12, dtype=torch.bool)
    prompt[:, :9] = True
    with routing_inputs(model, prompt_mask=prompt):
        model(**batch)
        assert torch.equal(layer_applications(model), expected)
    labels = torch.where(prompt, -100, batch["input_ids"])
    labels[1, 3] = -100
    model(**batch, labels=labels)
    assert torch.equal(layer_applications(model), expected)


@pytest.mark.parametrize("preset", SEQUENCE)
@torch.no_grad()
def test_recorded_routes_replay(preset):
    model = routed(preset)
    batch = padded_batch((12, 7))
    with record_routing(model) as record:
        expected = model(**batch).logits
    assert len(record) == LAYERS - 1
    assert all(ids.shape == (2, 1) for ids in record.values())
    scramble(model, seed=9)
    with replay_routing(model, record):
        assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
def test_budget_moves_compute_and_checks_its_range():
    batch = padded_batch((12, 7, 9, 5))
    for preset, budgets in {"dr_llm": (-1, -0.5, 0, 0.5, 1), "first": (1, 0.5, 0), "static": (1, 0.5, 0)}.items():
        model, used = routed(preset), []
        for budget in budgets:
            set_budget(model, budget)
            model(**batch, use_cache=False)
            used.append(layer_applications(model).float().mean().item())
        assert used == sorted(used), (preset, used)
        assert used[0] < used[-1]
        with pytest.raises(ConfigError, match="expected a number in"):
            set_budget(model, 1.5)


@torch.no_grad()
def test_random_skips_exactly_its_rate_and_static_is_even():
    model = routed("random", layers=[1, 2, 3, 4], budget=0.5)
    batch = padded_batch((9,) * 8)
    model(**batch)
    table = layer_applications(model)
    assert (table.sum(1) == LAYERS - 2).all()
    assert len({tuple(row) for row in table.tolist()}) > 1
    model = routed("static", budget=0.5)
    model(**batch)
    assert layer_applications(model)[0].tolist() == [1, 1, 0, 1, 0]
    assert evenly_spaced(list(range(10)), 0.0) == set()


def test_equal_scores_execute_and_interpolation_is_monotone():
    config = LayerRoutingConfig(budget=0.0)
    assert choose(torch.zeros(2, 3), config).tolist() == [1, 1]
    logits = torch.randn(64, 3)
    means = []
    for budget in (-0.9, -0.3, 0.0, 0.3, 0.9):
        config.budget = budget
        means.append(choose(logits, config).float().mean().item())
    assert means == sorted(means)


def test_focal_loss_reduces_to_cross_entropy_and_balances():
    logits, labels = torch.randn(20, 3), torch.randint(0, 3, (20,))
    torch.testing.assert_close(focal_loss(logits, labels, gamma=0.0), functional.cross_entropy(logits, labels))
    labels[3] = -100
    torch.testing.assert_close(focal_loss(logits, labels, gamma=0.0), functional.cross_entropy(logits, labels))
    weights = class_weights(torch.tensor([4399.0, 120956.0, 1457.0]), beta=0.99999)
    assert weights.tolist() == pytest.approx([0.743, 0.046, 2.211], abs=2e-3)
    assert class_weights(torch.tensor([5.0, 0.0]), 0.9).tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", ["first", "informed", "flexi", "mod"])
def test_gradient_reaches_the_router_and_never_the_base(preset, checkpointing):
    batch = padded_batch((9, 7))
    grads = []
    for again in (False, checkpointing):
        model = routed(preset, losses={}).train()
        if again:
            model.get_base_model().gradient_checkpointing_enable(dict(use_reentrant=False))
            model.get_base_model().enable_input_require_grads()
        torch.manual_seed(3)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        named = dict(model.named_parameters())
        assert all(named[name].requires_grad == ("moe_depth_" in name) for name in named)
    assert all("moe_depth_" in name for name in grads[0])
    last = [grad for name, grad in grads[0].items() if "scorer.last.weight" in name]
    assert len(last) >= 2
    assert all(grad.abs().sum() > 0 for grad in last)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_first_losses_move_the_rate():
    batch = padded_batch((9, 7))
    rates = {}
    for alpha in (0.0, 3.0):
        model = get_peft_model(tiny(), LayerRoutingConfig.from_preset("first", losses={"rate": alpha})).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.3)
        for _ in range(25):
            optimizer.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
        rates[alpha] = float(routing_losses(model)["rate"])
    assert rates[3.0] < 0.5 * rates[0.0]


def test_config_refuses_what_cannot_work():
    for wrong, message in (
        (dict(units="layers"), "expected one of"),
        (dict(actions=["skip"]), "with 'execute' among them"),
        (dict(actions=["execute", "approximate"]), "forecaster_hidden"),
        (dict(units="mlp"), "needs units='layer'"),
        (dict(budget=2.0), r"\[-1, 1\]"),
        (dict(losses={"rat": 1.0}), "Did you mean 'rate'"),
        (dict(train_mode="soft"), "mixes two actions"),
    ):
        with pytest.raises(ConfigError, match=message):
            LayerRoutingConfig(**wrong)
    with pytest.raises(ConfigError, match="Did you mean 'dr_llm'"):
        LayerRoutingConfig.from_preset("dr_lm")
    with pytest.raises(ConfigError, match="no field 'layer'"):
        LayerRoutingConfig.from_preset("dr_llm", layer=3)
    with pytest.raises(ConfigError, match="model has layers 0 to 4"):
        get_peft_model(tiny(), LayerRoutingConfig(layers=[7]))
