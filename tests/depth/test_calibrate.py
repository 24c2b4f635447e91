"""`calibrate_budget`: the knob ends where the wanted share is saved, whatever the router's confidence."""

import pytest
import torch
from peft import get_peft_model

from moe_kit import ConfigError, LayerRoutingConfig, RoutingError
from moe_kit.depth import calibrate_budget, layer_applications, set_budget
from moe_kit.depth.measure import routed_units
from moe_kit.depth.state import find_depth_state
from tests.depth.families import padded_batch, tiny

BATCHES = [padded_batch((12, 7, 9, 5), seed) for seed in (1, 2, 3)]


def routed(preset, scale=1.0, bias=0.0, **values):
    """A tiny model whose routers score at random, with a bias for executing."""
    model = get_peft_model(tiny(), LayerRoutingConfig.from_preset(preset, router_hidden=16, **values)).eval()
    generator = torch.Generator().manual_seed(7)
    for unit in routed_units(model):
        for name, parameter in unit.moe_depth_router.named_parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
            if name.endswith("last.bias"):
                parameter.data += bias * (torch.arange(parameter.numel()) == parameter.numel() - 1)
    return model


def saved_on(model, batches):
    rows = []
    for batch in batches:
        with torch.no_grad():
            model(**batch, use_cache=False)
        rows.append((1 - layer_applications(model).double()).sum(1))
    units = len(find_depth_state(model).units["default"])
    return float(torch.cat(rows).mean()) / (units if model.peft_config["default"].units == "layer" else units / 2)


@pytest.mark.parametrize("preset", ["informed", "flexi", "mod"])
@pytest.mark.parametrize("saved", [0.25, 0.6])
def test_token_routers_save_what_was_asked(preset, saved):
    model = routed(preset, scale=0.1)
    budget, share = calibrate_budget(model, BATCHES, saved, tolerance=0.02)
    assert model.peft_config["default"].budget == budget
    assert share == pytest.approx(saved, abs=0.02)
    assert saved_on(model, BATCHES) == pytest.approx(share, abs=1e-9)


def test_a_router_that_executes_everything_at_one_half_still_reaches_its_rate():
    # P(execute) is near 0.75 for every token: it samples at the rate 0.25 and never decides for it
    model = routed("informed", scale=0.03, bias=1.1)
    assert saved_on(model, BATCHES) == 0.0
    budget, share = calibrate_budget(model, BATCHES, 0.25, tolerance=0.02)
    assert 0.7 < budget < 0.8
    assert share == pytest.approx(0.25, abs=0.02)


def test_very_confident_routers_are_told_apart():
    model = routed("informed", bias=12.0)
    _, share = calibrate_budget(model, BATCHES, 0.25, tolerance=0.02)
    assert share == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("preset", ["dr_llm", "first"])
def test_sequence_routers_end_at_the_nearest_share(preset):
    model = routed(preset)
    _, share = calibrate_budget(model, BATCHES, 0.5)
    assert share == pytest.approx(saved_on(model, BATCHES), abs=1e-9)
    # 12 rows decide on 4 layers: no budget on a grid comes nearer
    low = -1.0 if preset == "dr_llm" else 0.0
    for step in range(41):
        set_budget(model, low + step * (1.0 - low) / 40)
        assert abs(saved_on(model, BATCHES) - 0.5) >= abs(share - 0.5) - 1 / 48


def test_static_routers_take_the_share_as_their_rate():
    model = routed("static")
    assert calibrate_budget(model, BATCHES, 0.5) == (0.5, 0.5)


def test_only_the_knob_moves():
    model = routed("informed").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate_budget(model, BATCHES, 0.25)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_answer_has_no_say_in_a_prompt_decision():
    model = routed("first")
    batch = padded_batch((12, 12))
    labels = batch["input_ids"].clone()
    labels[:, :6] = -100
    other = dict(batch, input_ids=torch.where(labels == -100, batch["input_ids"], 5))
    found = [calibrate_budget(model, [dict(b, labels=labels)], 0.5, passes=4) for b in (batch, other)]
    assert found[0] == found[1]


def test_wrong_arguments_are_refused():
    model = routed("first")
    for arguments in (dict(saved=1.5), dict(saved=0.5, tolerance=0.0), dict(saved=0.5, passes=0)):
        with pytest.raises(ConfigError, match="expected"):
            calibrate_budget(model, BATCHES, **arguments)
    with pytest.raises(ConfigError, match="at least one batch"):
        calibrate_budget(model, [], 0.5)
    with pytest.raises(RoutingError, match="no layer routers"):
        calibrate_budget(tiny(), BATCHES, 0.5)


def test_an_interrupted_search_leaves_the_knob(monkeypatch):
    model = routed("first")
    monkeypatch.setattr("moe_kit.depth.calibrate._saved_share", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        calibrate_budget(model, BATCHES, 0.9)
    assert model.peft_config["default"].budget == 0.5
