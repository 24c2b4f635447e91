"""A cache goes on with the routes it was filled with, whichever adapter is active now."""

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache

from moe_kit import RoutingError
from moe_kit.depth import LayerRoutingConfig, force_layers, layer_applications
from moe_kit.hf.cache import find_carrier
from tests.depth.families import LAYERS, padded_batch, tiny
from tests.depth.test_routers import routed

GREEDY = dict(max_new_tokens=4, do_sample=False)
ROUTE = [[1, 0, 1, 2, 1]]


def two_routers():
    model = get_peft_model(tiny(), LayerRoutingConfig()).eval()
    model.add_adapter("static", LayerRoutingConfig.from_preset("static", skip_layers=[4]))
    return model


def filled(model, table=ROUTE):
    ids = padded_batch((6,))["input_ids"]
    with force_layers(model, table):
        return ids, model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize("tokens", [1, 2])
@torch.no_grad()
def test_routes_of_an_adapter_that_is_off_are_refused(tokens):
    model = two_routers()
    ids, cache = filled(model)
    more = ids[:, :tokens]
    with pytest.raises(RoutingError, match="no layer router is active"), model.disable_adapter():
        model(more, past_key_values=cache)
    model.set_adapter("static")
    with pytest.raises(RoutingError, match="'static' is active"):
        model(more, past_key_values=cache)
    assert cache.get_seq_length() == 6
    # nothing was written, and the router that filled it goes on
    model.set_adapter("default")
    with force_layers(model, ROUTE):
        whole = model(torch.cat([ids, more], 1)).logits[:, -tokens:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(RoutingError, match="no layer router is active"), model.disable_adapter():
        model(more, past_key_values=cache)


@torch.no_grad()
def test_generate_refuses_them_too():
    model = two_routers()
    cache = DynamicCache(config=model.get_base_model().config)
    ids = padded_batch((6,))["input_ids"]
    with force_layers(model, ROUTE):
        start = model.generate(ids, **GREEDY, past_key_values=cache)
    with pytest.raises(RoutingError, match="no layer router is active"), model.disable_adapter():
        model.generate(start, **GREEDY, past_key_values=cache)
    model.set_adapter("static")
    with pytest.raises(RoutingError, match="'static' is active"):
        model.generate(start, **GREEDY, past_key_values=cache)


@torch.no_grad()
def test_rows_that_moved_are_looked_at_again():
    model = get_peft_model(tiny(), LayerRoutingConfig()).eval()
    batch = padded_batch((6, 6))
    with force_layers(model, [[1] * LAYERS, *ROUTE]):
        cache = model(**batch, use_cache=True).past_key_values
    assert find_carrier(cache) is not None
    cache.batch_select_indices(torch.tensor([0]))
    one = batch["input_ids"][:1]
    with model.disable_adapter():
        actual = model(one[:, :1], past_key_values=cache).logits
        whole = model(torch.cat([one, one[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(actual, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_request_that_executed_everything_goes_on_anywhere_but_starts_no_routes():
    model = two_routers()
    ids, cache = filled(model, [[1] * LAYERS])
    expected = model(torch.cat([ids, ids[:, :2]], 1)).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, expected[:, 6:7])
    model.set_adapter("static")
    with pytest.raises(RoutingError, match="computed without these routes"):
        model(ids[:, 1:2], past_key_values=cache)


@torch.no_grad()
def test_token_scope_cannot_go_on_with_routes_of_a_prompt():
    model = routed("informed")
    model.add_adapter("prompt", LayerRoutingConfig())
    model.set_adapter("prompt")
    ids, cache = filled(model)
    model.set_adapter("default")
    with pytest.raises(RoutingError, match="routes of the layer router 'prompt'"):
        model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_looking_costs_one_pass_not_every_step(monkeypatch):
    from moe_kit.depth import state

    seen = []
    look = state.refuse_others
    monkeypatch.setattr(state, "refuse_others", lambda *args: seen.append(args) or look(*args))
    model = two_routers()
    ids, cache = filled(model)
    seen.clear()
    for _ in range(3):
        model(ids[:, :1], past_key_values=cache)
        assert layer_applications(model).tolist() == ROUTE
    assert len(seen) <= 1
