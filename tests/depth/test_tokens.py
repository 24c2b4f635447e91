"""Token scope: exact under every cache, keys of skipped tokens written, work really saved."""

import copy

import pytest
import torch
from peft import get_peft_model

from moe_kit import RoutedAdapterConfig, RoutingError, record_routing, replay_routing, routing_losses
from moe_kit.depth import LayerRoutingConfig, force_layers, layer_applications, set_budget
from moe_kit.depth.execute import Call
from moe_kit.depth.losses import LOSSES, Trace
from moe_kit.depth.routers import ActionRouter
from moe_kit.depth.sparse import run_tokens
from moe_kit.depth.tokens import TokenDecision
from moe_kit.hf.hooks import HookedRouting
from tests.depth.families import FAMILIES, LAYERS, padded_batch, tiny
from tests.depth.test_routers import routed, scramble

GREEDY = dict(max_new_tokens=6, do_sample=False)
TOKEN = ("informed", "flexi", "mod")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", TOKEN)
@torch.no_grad()
def test_cached_generation_equals_recomputation(preset, family, attention):
    model = routed(preset, family, attention)
    for lengths in ((9, 6), (7, 7)):
        check_caches(model, padded_batch(lengths))


def check_caches(model, batch):
    expected = model.generate(**batch, **GREEDY, use_cache=False)
    share = layer_applications(model)
    assert (share[:, LAYERS // 2 + 1 :] < 1).float().mean() > 0, "no token skips here"
    for options in ({}, dict(cache_implementation="static"), dict(prefill_chunk_size=4)):
        assert torch.equal(model.generate(**batch, **GREEDY, **options), expected), options
    beams = dict(num_beams=3, **GREEDY)
    assert torch.equal(model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False))


def by_hand(model, batch):
    """Logits with every unit computed densely and its result replaced where a token does not execute."""
    state = next(m.__dict__["moe_depth_state"] for m in model.modules() if "moe_depth_state" in m.__dict__)
    with record_routing(model) as record:
        model(**batch, use_cache=False)
    plain = copy.deepcopy(model)
    handles = []
    columns = state.units["default"]
    for index, layer in enumerate(plain.get_base_model().model.layers):
        for part, name in enumerate(("self_attn", "mlp")):
            unit = columns.get(2 * index + part)
            site = None if unit is None else unit.site("default")
            if state.configs["default"].units == "layer":
                site = f"model.layers.{index}.depth.default"
            if site not in record:
                continue
            module = getattr(layer, name)
            forecast = module.depth_unit.moe_depth_forecaster
            handles.append(module.register_forward_hook(_replace(record[site][:, 0], forecast), with_kwargs=True))
    with plain.disable_adapter():
        return plain(**batch, use_cache=False).logits


def _replace(action_T, forecast):
    def hook(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        dense = output[0] if isinstance(output, tuple) else output
        other = forecast["default"](x) if "default" in forecast else torch.zeros_like(dense)
        run = (action_T == 1).view(*x.shape[:2], 1)
        mixed = torch.where(run, dense, other)
        return (mixed, None) if isinstance(output, tuple) else mixed

    return hook


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("preset", TOKEN)
@torch.no_grad()
def test_sparse_execution_equals_dense_with_results_replaced(preset, attention):
    for family in ("llama", "gemma3", "mistral"):
        model = routed(preset, family, attention)
        for lengths in ((9, 6), (9, 9)):
            batch = padded_batch(lengths)
            real = batch["attention_mask"].bool()
            actual = model(**batch, use_cache=False).logits
            torch.testing.assert_close(actual[real], by_hand(model, batch)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@torch.no_grad()
def test_keys_of_skipped_tokens_are_written_and_attention_is_not_run(family):
    model = routed("informed", family)
    batch = padded_batch((7,))
    table = torch.ones(1, 2 * LAYERS, dtype=torch.long)
    table[:, 2:] = 0
    base = model.get_base_model()
    layers = base.model.layers if hasattr(base, "model") else base.transformer.h
    calls = []
    for index, layer in enumerate(layers):
        output = layer.attn.c_proj if family == "gpt2" else layer.self_attn.o_proj
        output.register_forward_hook(lambda *_, index=index: calls.append(index))
    with force_layers(model, table):
        out = model(**batch, use_cache=True)
        step = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
    assert calls == [0, 0], "the output projection of a skipped attention ran"
    assert [layer.get_seq_length() for layer in step.past_key_values.layers[:LAYERS]] == [8] * LAYERS
    assert layer_applications(model).tolist() == [[1.0] + [0.0] * (LAYERS - 1)]


@pytest.mark.parametrize("action", [0, 3])
@torch.no_grad()
def test_forced_sub_layers_are_exact(action):
    model = routed("informed")
    batch = padded_batch((9, 6))
    table = torch.ones(2, 2 * LAYERS, dtype=torch.long)
    table[0, [2, 5, 7]] = action
    table[1, [3, 4, 9]] = action
    with force_layers(model, table):
        expected = model.generate(**batch, **GREEDY, use_cache=False)
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
    for row, length in enumerate((9, 6)):
        alone = {name: value[row : row + 1, 9 - length :] for name, value in batch.items()}
        with force_layers(model, table[row : row + 1]):
            assert torch.equal(model.generate(**alone, **GREEDY)[:, length:], expected[row : row + 1, 9:])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_sub_layers_per_sequence_are_exact(family):
    model = get_peft_model(tiny(family), LayerRoutingConfig(units="sub_layer", actions=["skip", "execute"])).eval()
    anchors = model.base_model._depth_found.anchors
    batch = padded_batch((9, 6))
    table = torch.randint(0, 2, (2, 2 * LAYERS), generator=torch.Generator().manual_seed(2))
    for anchor in anchors:
        table[:, 2 * anchor : 2 * anchor + 2] = 1
    for rows in (table, table[:1]):
        with force_layers(model, rows):
            expected = model.generate(**batch, **GREEDY, use_cache=False)
            assert torch.equal(model.generate(**batch, **GREEDY), expected)
            assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="static"), expected)


@torch.no_grad()
def test_rows_do_not_disturb_each_other():
    for preset in TOKEN:
        model = routed(preset)
        batch = padded_batch((9, 6, 8))
        together = model(**batch).logits
        for row, length in enumerate((9, 6, 8)):
            alone = {name: value[row : row + 1, 9 - length :] for name, value in batch.items()}
            torch.testing.assert_close(model(**alone).logits[0], together[row, 9 - length :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_records_replay():
    model = routed("informed")
    batch = padded_batch((9, 6))
    with record_routing(model) as record:
        expected = model(**batch).logits
    assert all(ids.shape == (18, 1) for ids in record.values())
    set_budget(model, 0.0)
    assert not torch.equal(model(**batch).logits, expected)
    with replay_routing(model, record):
        assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(RoutingError, match="replay on the same batch"), replay_routing(model, record):
        model(**padded_batch((9, 6, 7)))


def test_target_rate_is_reached_and_ignores_padding():
    torch.manual_seed(0)
    config = LayerRoutingConfig.from_preset("informed", target_rate=0.4, losses={"target": 8.0}, router_hidden=16)
    model = get_peft_model(tiny(), config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    batch = padded_batch((16, 3))
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
    model.eval()
    shares = []
    for seed in range(6):
        with torch.no_grad():
            model(**padded_batch((16, 3), seed=seed))
        shares.append(layer_applications(model)[:, 1:].mean())
    assert abs(float(torch.stack(shares).mean()) - 0.6) < 0.15


def test_losses_are_what_their_formulas_say():
    router = ActionRouter(LayerRoutingConfig.from_preset("first"), 4)
    gates = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    mask = torch.tensor([True, True, False])
    traces = [Trace(index, torch.zeros(3, 2), gate, mask, router) for index, gate in enumerate(gates)]
    traces[0].dissimilarity_N = torch.tensor([0.5, 0.25, 9.0])
    assert float(LOSSES["rate"](traces, 0.0)) == pytest.approx(0.5 + 1.0)
    assert float(LOSSES["target"](traces, 0.4)) == pytest.approx(abs(0.6 - 0.75))
    assert float(LOSSES["square"](traces, 0.0)) == pytest.approx((4 + 1) / 2)
    assert float(LOSSES["similarity"](traces, 0.0)) == pytest.approx(0.25)
    # the sum over the two units of a layer, the mean over layers
    traces[1].dissimilarity_N, traces[1].gate_N = torch.tensor([0.4, 0.2, 9.0]), torch.zeros(3)
    assert float(LOSSES["similarity"](traces, 0.0)) == pytest.approx(0.25 + 0.3)
    traces[1].layer = 1
    assert float(LOSSES["similarity"](traces, 0.0)) == pytest.approx((0.25 + 0.3) / 2)
    traces[1].gate_N = gates[1]
    torch.nn.init.constant_(router.scorer.last.weight, 0.5)
    assert float(LOSSES["weight"](traces, 0.0)) == pytest.approx(2 * 4 * 0.25)


def test_capacity_takes_the_top_tokens_of_each_row_and_teaches_the_predictor():
    torch.manual_seed(0)
    model = get_peft_model(tiny(), LayerRoutingConfig.from_preset("mod", target_rate=0.5)).train()
    scramble(model, scale=1.0)
    batch = padded_batch((12, 6))
    model(**batch, labels=batch["input_ids"])
    assert torch.equal(layer_applications(model)[:, 1:], torch.full((2, LAYERS - 1), 0.5))
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "predictor" in n], 0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"])
        loss = routing_losses(model)["capacity"]
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_routed_adapters_inside_see_the_tokens_that_run():
    model = tiny()
    model.add_adapter(LayerRoutingConfig.from_preset("informed"), "depth")
    model.add_adapter(
        RoutedAdapterConfig.from_preset(
            "mixture_of_lora", num_experts=3, top_k=2, r=2, target_modules=["up_proj", "o_proj"]
        ),
        "routed",
    )
    model.set_adapter(["depth", "routed"])
    for name, parameter in model.named_parameters():
        if "moe_adapter" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    scramble(model.eval())
    batch = padded_batch((9, 6))
    expected = model.generate(**batch, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("actions", [[1, 3, 3, 1, 0, 3], [3] * 6, [1] * 6, [0, 1, 0, 1, 1, 0], [0] * 6])
def test_results_forecasts_and_zeros_are_placed_and_weighted(actions, gated):
    """g F(x) where a token executes, (1 - g) G(x) where it is approximated, 0 elsewhere; with every gradient."""
    torch.manual_seed(0)
    action_T = torch.tensor(actions)
    unit, forecaster = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    inputs = [torch.randn(2, 3, 4, requires_grad=True), torch.rand(6, requires_grad=True)]
    learned = [*inputs, *unit.parameters(), *forecaster.parameters()]
    running = (action_T == 1).view(2, 3).sum(1).tolist()
    decision = TokenDecision(
        action_T, inputs[1] if gated else None, False, sum(running), int((action_T == 3).sum()), max(running), batch=2
    )
    call = Call(unit, torch.nn.Linear.forward, {}, "mlp", 0, HookedRouting())
    actual = run_tokens(call, inputs[0], decision, forecaster)
    gate, rest = (inputs[1].view(2, 3, 1), 1 - inputs[1].view(2, 3, 1)) if gated else (1.0, 1.0)
    action = action_T.view(2, 3, 1)
    expected = gate * unit(inputs[0]) * (action == 1) + rest * forecaster(inputs[0]) * (action == 3)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    if actual.requires_grad:
        pairs = zip(*(torch.autograd.grad(y, learned, upstream, allow_unused=True) for y in (actual, expected)))
        for name, (ours, theirs) in enumerate(pairs):
            zeros = torch.zeros_like(learned[name])
            torch.testing.assert_close(zeros if ours is None else ours, zeros if theirs is None else theirs)
