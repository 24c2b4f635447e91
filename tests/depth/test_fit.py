"""Training recipes: each one learns what it is for, and touches nothing else."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_kit import ConfigError
from moe_kit.depth import LayerRoutingConfig, layer_applications
from moe_kit.depth.fit import FitConfig, fit_end_to_end, fit_forecasters, fit_others, fit_policy, fit_supervised
from moe_kit.depth.measure import forecast_losses, layer_importance
from moe_kit.depth.state import find_depth_state
from tests.depth.families import LAYERS, padded_batch, tiny
from tests.depth.test_routers import scramble


def labelled(seed=1, rows=4, marker=None):
    """Prompts of 8 tokens with answers of 4; the first prompt tokens may carry a marker."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 64, (rows, 12), generator=generator)
    if marker is not None:
        ids[:, :8] = marker[:, None]
    labels = ids.clone()
    labels[:, :8] = -100
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)


def batches(count, **options):
    return (labelled(seed, **options) for seed in range(count))


def changed(model, before):
    return {n.split(".depth_unit.")[-1] for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def copies(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_supervised_routers_learn_searched_routes():
    torch.manual_seed(0)
    model = get_peft_model(tiny(), LayerRoutingConfig()).train()
    routes = torch.tensor([[1, 0, 1, 2, 1], [1, 1, 2, 1, 0]])
    markers = torch.tensor([2, 3, 2, 3])
    data = [(labelled(seed, marker=markers), routes[markers - 2]) for seed in range(40)]
    before = copies(model)
    history = fit_supervised(model, data, FitConfig(steps=40, learning_rate=3e-2), class_counts=[2, 7, 2])
    assert history[-1] < 0.1 * history[0]
    assert all("moe_depth_router" in name for name in changed(model, before))
    model.eval()
    with torch.no_grad():
        model(**{k: v for k, v in labelled(99, marker=markers).items() if k != "labels"}, use_cache=False)
        batch = labelled(99, marker=markers)
        model(**batch)
    assert torch.equal(layer_applications(model), routes[markers - 2])


@pytest.mark.parametrize("preset", ["first", "flexi", "mod"])
def test_end_to_end_moves_routers_and_lowers_the_loss(preset):
    torch.manual_seed(0)
    model = get_peft_model(tiny(), LayerRoutingConfig.from_preset(preset))
    batch = labelled()
    before = copies(model)
    history = fit_end_to_end(model, [batch] * 30, FitConfig(steps=30, learning_rate=1e-2))
    moved = changed(model, before)
    assert moved
    assert all("moe_depth" in name for name in moved)
    assert history[-1] < history[0]


def test_informed_two_phases():
    torch.manual_seed(0)
    model = get_peft_model(tiny(), LayerRoutingConfig.from_preset("informed", router_hidden=16))
    zero = forecast_losses(model, labelled(50), zero=True)
    before = copies(model)
    fit_forecasters(model, batches(60), FitConfig(steps=60, learning_rate=1e-2))
    assert all("forecaster" in name for name in changed(model, before))
    fitted = forecast_losses(model, labelled(50))
    assert set(fitted) == set(zero)
    assert len(fitted) == 2 * (LAYERS - 1)
    assert all(fitted[path] < 0.97 * zero[path] for path in zero), "a forecaster is no better than zero"
    before = copies(model)
    history = fit_end_to_end(model, batches(10), FitConfig(steps=10, learning_rate=1e-2))
    assert all("router" in name for name in changed(model, before))
    assert len(history) == 10
    assert model.peft_config["default"].tau == pytest.approx(1.0)


def test_policy_learns_that_layers_cost():
    torch.manual_seed(0)
    config = LayerRoutingConfig(actions=["skip", "execute"], train_mode="sample", init="paper", router="linear")
    model = get_peft_model(tiny(), config)
    values = fit_policy(model, [labelled()] * 40, FitConfig(steps=40, learning_rate=3e-2, cost=50.0, samples=6))
    assert sum(values[-5:]) < sum(values[:5])
    model.eval()
    with torch.no_grad():
        model(**labelled())
    assert layer_applications(model)[:, 1:].float().mean() < 0.5
    other = get_peft_model(tiny(), LayerRoutingConfig())
    with pytest.raises(ConfigError, match="train_mode='sample'"):
        fit_policy(other, batches(1), FitConfig(steps=1))


def test_policy_gradient_is_unbiased_on_one_layer():
    """The estimator's mean equals the gradient of the expected loss, summed over both actions of one layer."""
    from moe_kit.depth.fit import _policy_loss

    torch.manual_seed(0)
    config = LayerRoutingConfig(
        actions=["skip", "execute"], train_mode="sample", init="paper", router="linear", layers=[3]
    )
    model = get_peft_model(tiny(), config).train()
    state = find_depth_state(model)
    settings, batch = FitConfig(samples=2, cost=0.5), labelled(rows=1)
    last = model.get_base_model().model.layers[3].depth_unit.moe_depth_router["default"].scorer.last
    # even odds: a saturated router has no gradient to estimate
    torch.nn.init.zeros_(last.weight)
    mean, draws = 0.0, 300
    for _ in range(draws):
        last.weight.grad = None
        _policy_loss(model, state, batch, settings, []).backward()
        mean = mean + last.weight.grad / draws
    from moe_kit.depth import force_layers

    penalties = []
    for action in (0, 1):
        table = torch.ones(1, LAYERS, dtype=torch.long)
        table[0, 3] = action
        with force_layers(model, table):
            penalties.append(float(model(**batch, use_cache=False).loss) + settings.cost * action)
    last.weight.grad = None
    model(**batch, use_cache=False)
    probabilities = state.present.traces[0].logits_NA.softmax(-1)[0]
    (probabilities * torch.tensor(penalties)).sum().backward()
    exact = last.weight.grad
    assert torch.nn.functional.cosine_similarity(mean.flatten(), exact.flatten(), dim=0) > 0.99
    assert float(mean.norm() / exact.norm()) == pytest.approx(1.0, abs=0.2)


def test_lora_phase_runs_under_hard_frozen_routers():
    torch.manual_seed(0)
    model = tiny()
    model.add_adapter(LayerRoutingConfig.from_preset("first"), "depth")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), "lora")
    model.set_adapter(["depth", "lora"])
    scramble(model)
    before = copies(model)
    history = fit_others(model, [labelled()] * 15, FitConfig(steps=15, learning_rate=3e-2), adapters=["lora"])
    assert history[-1] < history[0]
    assert all("lora_" in name for name in changed(model, before))
    model.train()
    trained = model(**labelled()).loss
    model.eval()
    assert float(model(**labelled()).loss) == pytest.approx(float(trained), rel=1e-5), (
        "routers were not hard in training"
    )
    assert (layer_applications(model) == 0).any()


def test_importance_and_bad_settings():
    model = tiny()
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    batch = padded_batch((9, 5))
    influence = layer_importance(model, [batch])
    assert influence.argmin() == 2
    assert influence[2].abs() < 1e-5
    routed = scramble(get_peft_model(model, LayerRoutingConfig()))
    torch.testing.assert_close(layer_importance(routed, [batch]), influence)
    with pytest.raises(ConfigError, match="ended after 2 of 5"):
        fit_end_to_end(get_peft_model(tiny(), LayerRoutingConfig.from_preset("first")), batches(2), FitConfig(steps=5))
    with pytest.raises(ConfigError, match="nothing to train"):
        fit_end_to_end(get_peft_model(tiny(), LayerRoutingConfig.from_preset("static")), batches(1), FitConfig(steps=1))
    for wrong in (dict(steps=0), dict(learning_rate=0.0), dict(samples=1), dict(schedule="step")):
        with pytest.raises(ConfigError):
            FitConfig(**wrong)
