"""What is looked up once a pass: units that execute are not asked, and a request goes on as it was begun."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from moe_kit import RoutingError, record_routing, replay_routing
from moe_kit.depth import LayerRoutingConfig, force_layers, layer_applications
from moe_kit.depth.routers import choose, choose_rows
from moe_kit.depth.state import find_depth_state
from moe_kit.depth.unit import DepthUnit
from moe_kit.hf.cache import find_carrier
from tests.depth.families import padded_batch
from tests.depth.test_routers import routed, scramble

ROUTE = [[1, 0, 1, 2, 1]]


@pytest.fixture
def asked(monkeypatch):
    """Indices of the layers whose unit is asked, as they are asked."""
    layers = []
    run = DepthUnit.run

    def counted(self, *args):
        layers.append(self.layer)
        return run(self, *args)

    monkeypatch.setattr(DepthUnit, "run", counted)
    return layers


@torch.no_grad()
def test_decoding_asks_only_units_that_neither_execute_nor_skip_for_all_rows(asked):
    model, ids = routed(), padded_batch((6,))["input_ids"]
    with force_layers(model, ROUTE):
        cache = model(ids, use_cache=True).past_key_values
    assert asked == [1, 2, 3, 4]
    asked.clear()
    expected = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    # a copied cache has no plans yet, the one that was decided on has
    assert asked == [1, 2, 3, 4]
    asked.clear()
    assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, expected)
    assert asked == [3]
    asked.clear()
    with record_routing(model) as record:
        model(ids[:, :1], past_key_values=cache)
    assert [ids.item() for ids in record.values()] == ROUTE[0][1:]
    with model.disable_adapter():
        asked.clear()
        model(ids)
    assert not asked


@torch.no_grad()
def test_other_routes_are_refused_before_the_cache_is_written():
    model, ids = routed(), padded_batch((6,))["input_ids"]
    with record_routing(model) as record, force_layers(model, [[1, 1, 1, 1, 0]]):
        model(ids)
    with force_layers(model, ROUTE):
        cache = model(ids, use_cache=True).past_key_values
    more = ids[:, :2]
    for other in (force_layers(model, [[1, 1, 1, 1, 1]]), replay_routing(model, dict(record))):
        with pytest.raises(RoutingError, match="continues with the routes"), other:
            model(more, past_key_values=cache)
    with pytest.raises(RoutingError, match="carries routes of 1 rows"):
        model(more.expand(2, -1), past_key_values=cache)
    assert cache.get_seq_length() == 6
    with force_layers(model, ROUTE):
        whole = model(torch.cat([ids, more], 1)).logits[:, -2:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_copied_cache_is_a_branch_of_the_request():
    model, ids = routed(), padded_batch((6,))["input_ids"]
    with force_layers(model, ROUTE):
        cache = model(ids, use_cache=True).past_key_values
    assert find_carrier(cache).notes
    # a plan knows the units of the model, which a copy of the cache must not copy
    assert not find_carrier(copy.deepcopy(cache)).notes
    branch = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    one, two = (model(ids[:, :2], past_key_values=c).logits for c in (cache, branch))
    assert torch.equal(one, two)
    assert layer_applications(model).tolist() == ROUTE


@torch.no_grad()
def test_a_backbone_called_alone_decides_anew():
    model = routed()
    backbone = model.get_base_model().model
    seen = set()
    for seed in range(8):
        ids = padded_batch((12,), seed=seed)["input_ids"]
        expected = model(ids, use_cache=False)
        routes = layer_applications(model)
        seen.add(tuple(routes[0].tolist()))
        model(padded_batch((5,), seed=seed + 50)["input_ids"], use_cache=False)
        hidden = backbone(ids, use_cache=False).last_hidden_state
        assert torch.equal(layer_applications(model), routes)
        assert torch.equal(model.get_base_model().lm_head(hidden), expected.logits)
    assert len(seen) > 1


@torch.no_grad()
def test_a_failing_pass_leaves_no_trace():
    model, ids = routed(), padded_batch((6,))["input_ids"]
    expected = model(ids).logits
    state = find_depth_state(model)
    handle = model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, past_key_values=DynamicCache())
    handle.remove()
    assert state.present.under_way is None
    assert not state.present.executing
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_an_interrupted_pass_is_forgotten():
    model, ids = routed(), padded_batch((6,))["input_ids"]
    backbone, other = model.get_base_model().model, padded_batch((12,), seed=5)["input_ids"]
    expected, hidden = model(other, use_cache=False).logits, backbone(other, use_cache=False).last_hidden_state

    def interrupt(*_):
        raise KeyboardInterrupt

    for again, wanted in ((model, expected), (backbone, hidden)):
        # torch runs no closing hook here
        handle = backbone.norm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, use_cache=False)
        handle.remove()
        assert torch.equal(again(other, use_cache=False)[0], wanted)


@torch.no_grad()
def test_a_record_of_another_model_is_refused():
    model, ids = routed(), padded_batch((6,))["input_ids"]
    with record_routing(model) as record:
        model(ids)
    fewer, sub_layers = routed(layers=[1, 2]), routed("informed")
    for other in (fewer, sub_layers):
        with record_routing(other) as strange:
            other(ids)
        for target, wrong in ((model, strange), (other, record)):
            with pytest.raises(RoutingError, match="of another model"), replay_routing(target, dict(wrong)):
                target(ids)
    damaged = {site: torch.full_like(actions, 7) for site, actions in record.items()}
    with pytest.raises(RoutingError, match=r"actions \[7\]"), replay_routing(model, damaged):
        model(ids)
    with record_routing(sub_layers) as record:
        sub_layers(ids)
    twice = {site: torch.full_like(actions, 2) for site, actions in record.items()}
    with pytest.raises(RoutingError, match=r"actions \[2\]"), replay_routing(sub_layers, twice):
        sub_layers(ids)


@torch.no_grad()
def test_a_forced_table_is_the_callers_no_more():
    model, ids = routed(), padded_batch((6,))["input_ids"]
    table = torch.tensor(ROUTE)
    with force_layers(model, table):
        table.fill_(1)
        model(ids)
        assert layer_applications(model).tolist() == ROUTE


def chunk_warnings(model, chunk=5, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(**padded_batch((12,)), max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk, **options)
    return [str(w.message) for w in caught if "first chunk" in str(w.message)]


@torch.no_grad()
def test_decisions_on_a_first_chunk_are_said_once_a_model():
    model = routed()
    with force_layers(model, ROUTE):
        assert not chunk_warnings(model)
    with model.disable_adapter():
        assert not chunk_warnings(model)
    assert not chunk_warnings(model, chunk=12)
    assert chunk_warnings(model) == [
        "moe_kit: with prefill_chunk_size=5 a sequence's layer routes are decided on its first chunk."
    ]
    assert not chunk_warnings(model)
    assert not chunk_warnings(model, chunk=4)
    assert len(chunk_warnings(routed("first"))) == len(chunk_warnings(routed("random"))) == 1


@pytest.mark.parametrize("preset", ["informed", "flexi", "mod", "static"])
@torch.no_grad()
def test_what_reads_no_prompt_is_silent_about_chunks(preset):
    assert not chunk_warnings(routed(preset))


@torch.no_grad()
def test_a_replayed_route_is_obeyed_through_generation():
    model, greedy = routed(), dict(max_new_tokens=6, do_sample=False)
    batch = padded_batch((12, 7))
    with record_routing(model) as record:
        expected = model.generate(**batch, **greedy)
    routes = layer_applications(model)
    assert all(ids.shape == (2, 1) for ids in record.values())
    # the recorded route is no longer what the routers would choose
    scramble(model, seed=9)
    model.generate(**batch, **greedy)
    assert not torch.equal(layer_applications(model), routes)
    with replay_routing(model, dict(record)):
        for options in (
            {},
            dict(use_cache=False),
            dict(cache_implementation="static"),
            dict(prefill_chunk_size=5),
        ):
            assert torch.equal(model.generate(**batch, **greedy, **options), expected), options
            assert torch.equal(layer_applications(model), routes)
        assert not find_depth_state(model).warned_chunks, "a replayed route was said to be decided"
        beams = dict(num_beams=3, **greedy)
        assert torch.equal(model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False))


LOGITS = st.lists(st.lists(st.sampled_from([-2.0, 0.0, 0.5, 0.5000001, 3.0]), min_size=3, max_size=3), min_size=1)


@given(
    logits=LOGITS,
    kind=st.sampled_from(["interpolation", "threshold", "rate"]),
    budget=st.sampled_from([-1.0, -0.4, 0.0, 0.3, 0.7, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_the_host_chooses_what_the_tensors_choose(logits, kind, budget):
    budget = budget if kind == "interpolation" else abs(budget)
    config = LayerRoutingConfig(budget_kind=kind, budget=budget)
    assert choose_rows(logits, config) == choose(torch.tensor(logits), config).tolist()
