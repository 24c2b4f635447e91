"""Forecasters of whole layers, and what routers of both methods say when nothing is to be saved."""

import pytest
import torch
from peft import get_peft_model

from moe_kit import LayerRoutingConfig, RoutingError
from moe_kit.depth import force_layers, layer_applications
from moe_kit.depth.fit import FitConfig, fit_forecasters
from moe_kit.depth.measure import forecast_losses
from tests.depth.families import LAYERS, padded_batch, tiny
from tests.depth.test_fit import batches, labelled
from tests.depth.test_routers import scramble

GREEDY = dict(max_new_tokens=5, do_sample=False)
ALL = ["skip", "execute", "repeat", "approximate"]


def routed(family="llama"):
    return scramble(get_peft_model(tiny(family), LayerRoutingConfig(actions=ALL, forecaster_hidden=8)).eval())


@torch.no_grad()
def test_an_approximated_layer_adds_its_forecast():
    model, batch = routed(), padded_batch((9, 9))
    layers = model.get_base_model().model.layers
    with force_layers(model, [[1, 1, 3, 1, 1], [1, 1, 1, 3, 1]]):
        out = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
    assert layer_applications(model).tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 0, 1]]
    for row, layer in enumerate((2, 3)):
        forecaster = layers[layer].depth_unit.moe_depth_forecaster["default"]
        x = out[layer][row]
        assert torch.equal(out[layer + 1][row], x + forecaster(x))
        assert forecaster(x).abs().sum() > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_approximated_layers_are_exact_with_every_cache(family):
    model, batch = routed(family), padded_batch((9, 6))
    free = [1, 3, 1, 3, 1] if family != "gemma3" else [1, 3, 1, 3, 3]
    mixed = [[1, 3, 1, 0, 3], [1, 0, 1, 3, 2]]
    for table in ([free], mixed):
        with force_layers(model, table):
            expected = model.generate(**batch, **GREEDY, use_cache=False)
            for options in ({}, dict(cache_implementation="static"), dict(prefill_chunk_size=4)):
                assert torch.equal(model.generate(**batch, **GREEDY, **options), expected), (table, options)
            beams = dict(num_beams=3, **GREEDY)
            assert torch.equal(model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False))
    for row, length in enumerate((9, 6)):
        one = {name: value[row : row + 1, 9 - length :] for name, value in batch.items()}
        with force_layers(model, mixed[row : row + 1]):
            assert torch.equal(model.generate(**one, **GREEDY)[:, length:], expected[row : row + 1, 9:])


@torch.no_grad()
def test_routers_that_choose_to_approximate_ride_on_the_cache():
    model, batch = routed(), padded_batch((12, 7, 9))
    expected = model.generate(**batch, **GREEDY, use_cache=False)
    applied = layer_applications(model)
    state = model.get_base_model().__dict__["moe_depth_state"]
    assert (state.decided("default") == 3).any(), "nothing is approximated here"
    for options in ({}, dict(cache_implementation="static")):
        assert torch.equal(model.generate(**batch, **GREEDY, **options), expected)
        assert torch.equal(layer_applications(model), applied)
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(RoutingError, match="continues with the routes"), force_layers(model, [[1] * LAYERS]):
        model(batch["input_ids"][:, :1], past_key_values=cache)


def test_forecasters_of_whole_layers_learn_the_increment():
    torch.manual_seed(0)
    model = get_peft_model(tiny(), LayerRoutingConfig(actions=["execute", "approximate"], forecaster_hidden=16))
    zero = forecast_losses(model, labelled(50), zero=True)
    assert set(zero) == {f"model.layers.{layer}" for layer in range(1, LAYERS)}
    fit_forecasters(model, batches(40), FitConfig(steps=40, learning_rate=1e-2))
    fitted = forecast_losses(model, labelled(50))
    assert all(fitted[path] < 0.97 * zero[path] for path in zero), "a forecaster is no better than zero"
    # by hand: SmoothL1 between the forecast and output minus input
    with torch.no_grad(), force_layers(model, [[1] * LAYERS]):
        states = model(labelled(50)["input_ids"], use_cache=False, output_hidden_states=True).hidden_states
    forecaster = model.get_base_model().model.layers[2].depth_unit.moe_depth_forecaster["default"]
    loss = torch.nn.functional.smooth_l1_loss(forecaster(states[2]), states[3] - states[2])
    torch.testing.assert_close(fitted["model.layers.2"], loss)


def test_a_target_of_nothing_drives_informed_to_the_base_model():
    torch.manual_seed(0)
    batch = padded_batch((12, 7))
    expected = tiny()(**batch).logits
    # the price alone is to decide here, not what the random base would like
    values = dict(target_rate=0.0, losses={"target": 80.0}, router_hidden=16, layers=[1, 3])
    model = scramble(get_peft_model(tiny(), LayerRoutingConfig.from_preset("informed", **values)), scale=0.3)
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        assert (layer_applications(model) < 1).any()
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "router" in n], 0.05)
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(layer_applications(model), torch.ones(2, LAYERS))
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[real], expected[real])


def test_first_with_all_ones_is_the_base_model_while_it_trains():
    batch = padded_batch((12, 7))
    expected = tiny().train()(**batch, labels=batch["input_ids"])
    model = get_peft_model(tiny(), LayerRoutingConfig.from_preset("first", losses={})).train()
    out = model(**batch, labels=batch["input_ids"])
    # a fresh router is a soft 0.993
    assert not torch.allclose(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if "scorer.last.bias" in name:
            torch.nn.init.constant_(parameter, 60.0)
    out = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
