"""Losses of layer routers reach whoever trains: the model's loss, or a trainer's own loss; or are refused."""

import pytest
import torch
from peft import get_peft_model

from moe_kit import (
    ConfigError,
    RoutedAdapterConfig,
    RoutingError,
    record_routing,
    routing_losses,
    routing_metrics,
)
from moe_kit.depth import LayerRoutingConfig, force_layers
from moe_kit.depth.fit import FitConfig, fit_supervised
from moe_kit.routing.state import weighted_routing_loss
from tests.depth.families import LAYERS, padded_batch, tiny
from tests.depth.test_routers import routed, scramble

PRICES = {
    "first": {"rate": 0.5, "weight": 0.1},
    "informed": {"target": 8.0, "similarity": 0.1},
    "flexi": {"square": 1e-2},
    "mod": {"capacity": 0.1},
}


def labelled():
    batch = padded_batch((9, 7))
    return dict(batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))


def trained(preset, **losses):
    return routed(preset, losses=losses).train()


def passed(model, **options):
    torch.manual_seed(3)
    return model(**labelled(), **options)


@pytest.mark.parametrize("preset", PRICES)
def test_every_way_to_ask_gives_the_same_total(preset):
    prices = PRICES[preset]
    plain = passed(trained(preset)).loss
    model = trained(preset, **prices)
    total = passed(model).loss
    parts = routing_losses(model)
    assert set(parts) == set(prices)
    expected = plain + sum(coefficient * parts[name] for name, coefficient in prices.items())
    torch.testing.assert_close(total, expected)
    assert total.item() != plain.item()
    torch.testing.assert_close(passed(model, return_dict=False)[0], total)
    torch.testing.assert_close(passed(model, num_items_in_batch=30).loss, _items(preset, prices))


def _items(preset, prices):
    """The model's loss with a step of 30 label tokens, of which this batch holds 15 after the shift."""
    plain = passed(trained(preset), num_items_in_batch=30).loss
    model = trained(preset, **prices)
    passed(model)
    return plain + 0.5 * sum(c * routing_losses(model)[name] for name, c in prices.items())


def test_a_training_loop_with_its_own_loss_adds_them_or_is_told():
    model = trained("first", rate=10.0)
    batch = {name: value for name, value in labelled().items() if name != "labels"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    (model(**batch).logits.square().mean() + weighted_routing_loss(model)).backward()
    torch.testing.assert_close(weighted_routing_loss(model), 10.0 * routing_losses(model)["rate"])
    grads = [p.grad for n, p in model.named_parameters() if "scorer.last.weight" in n]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    optimizer.step()
    model(**batch).logits.square().mean().backward()
    with pytest.raises(ConfigError, match="weighted_routing_loss"):
        optimizer.step()
    passed(model).loss.backward()
    optimizer.step()


def test_a_trainer_that_logs_as_for_a_mixture_of_experts_gets_them():
    model = trained("first", rate=10.0)
    assert model.get_base_model().config.output_router_logits is False
    with torch.no_grad():
        out = passed(model, output_router_logits=True)
    assert float(out.aux_loss) == 0.0
    bare = model.unload()
    assert not hasattr(bare.config, "output_router_logits")


def test_frozen_routers_cost_nothing():
    totals = []
    for prices in ({}, {"rate": 10.0}):
        model = trained("first", **prices)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed" in name)
        totals.append(passed(model).loss)
        assert not routing_losses(model)
    assert torch.equal(*totals)


def test_losses_stand_beside_those_of_routed_adapters_and_records():
    model = tiny()
    model.add_adapter(LayerRoutingConfig.from_preset("first", losses={"rate": 0.5}), "depth")
    model.add_adapter(
        RoutedAdapterConfig.from_preset("mixture_of_lora", num_experts=3, top_k=2, r=2, target_modules=["q_proj"]),
        "moe",
    )
    model.set_adapter(["depth", "moe"])
    scramble(model.train())
    with record_routing(model) as record:
        total = passed(model).loss
    parts = routing_losses(model)
    assert "rate" in parts
    assert len(parts) > 1
    assert sum(".depth." in site for site in record) == LAYERS - 1
    total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("preset", ["first", "informed", "flexi", "mod", "dr_llm"])
def test_reentrant_checkpointing_is_refused(preset):
    model = routed(preset).train()
    base = model.get_base_model()
    base.gradient_checkpointing_enable(dict(use_reentrant=True))
    base.enable_input_require_grads()
    batch = {name: value for name, value in labelled().items() if name != "labels"}
    searched = [(batch, torch.ones(2, LAYERS, dtype=torch.long))]
    train = passed if preset != "dr_llm" else lambda model: fit_supervised(model, searched, FitConfig(steps=1))
    with pytest.raises(ConfigError, match="use_reentrant"):
        train(model)
    # nothing is left open; routers that do not learn, and passes without gradients, may go on
    with torch.no_grad():
        passed(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("moe_depth_router" not in name)
    passed(model).loss.backward()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_balance_loss_of_the_base_needs_every_token_in_every_layer(family):
    for preset, table in (("dr_llm", [[1, 0, 1, 2, 1], [1, 1, 1, 1, 0]]), ("dr_llm", [[1, 0, 1, 0, 1]])):
        model = routed(preset, family).train()
        with pytest.raises(RoutingError, match="output_router_logits"), force_layers(model, table):
            passed(model, output_router_logits=True)
    for preset in ("flexi", "mod"):
        model = routed(preset, family).train()
        with pytest.raises(RoutingError, match="output_router_logits"):
            passed(model, output_router_logits=True)
        assert passed(model).loss.isfinite()
        model.get_base_model().config.output_router_logits = True
        with pytest.raises(RoutingError, match="output_router_logits"):
            passed(model)
    # what runs everything may ask
    model = get_peft_model(tiny(family), LayerRoutingConfig()).train()
    expected = tiny(family).train()(**labelled(), output_router_logits=True).loss
    torch.testing.assert_close(passed(model, output_router_logits=True).loss, expected)


def test_a_dense_base_may_skip_though_a_trainer_set_the_field_that_was_announced():
    model = trained("first", rate=1.0)
    batch, route = labelled(), [[1, 0, 1, 1, 0]]
    with force_layers(model, route):
        expected = model(**batch).logits
        model.get_base_model().config.output_router_logits = True
        assert torch.equal(model(**batch, output_router_logits=False).logits, expected)
        assert torch.equal(model(**batch).logits, expected)


def test_routing_metrics_are_about_experts_and_not_about_layers(caplog):
    model = get_peft_model(tiny(), LayerRoutingConfig.from_preset("informed")).train()
    model(**padded_batch((20, 20, 20)))
    # it executes everything, as a fresh router should
    assert routing_metrics(model) == {}
    assert not caplog.records
