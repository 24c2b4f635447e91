"""Metrics of the last pass: values by hand, a bounded number of keys, padding, and the alarm."""

import logging
import math

import pytest
import torch
from peft import get_peft_model

from moe_kit import RoutedAdapterConfig, routing_metrics
from moe_kit.errors import RoutingError
from moe_kit.routing import Router, RoutingContext
from moe_kit.routing.scope import TokenScope
from moe_kit.routing.select import SelectTopK
from moe_kit.routing.state import ATTRIBUTE, ModelRouting
from moe_kit.routing.weight import SelectedSoftmaxWeight
from tests.tiny import batch_of, tiny_llama


class Fixed(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, decisions):
        return self.logits


class Model(torch.nn.Module):
    """Routers with fixed logits."""

    def __init__(self, *logits, k=1, mask=None):
        super().__init__()
        experts = logits[0].shape[1]
        self.routers = torch.nn.ModuleList(
            Router(
                experts,
                scope=TokenScope(),
                score=Fixed(values),
                select=SelectTopK(k),
                weight=SelectedSoftmaxWeight(),
            )
            for values in logits
        )
        self.__dict__[ATTRIBUTE] = state = ModelRouting()
        state.open(RoutingContext(mask_BS=mask))
        for index, router in enumerate(self.routers):
            router.site = f"layer {index}"
            router(torch.zeros(1, logits[0].shape[0], 2), state.context)
        state.close()


def test_values_by_hand():
    one = torch.tensor([[9.0, 0, 0, 0]] * 3 + [[0, 9.0, 0, 0]])
    two = torch.tensor([[9.0, 0, 0, 0]] * 4)
    found = routing_metrics(Model(one, two))
    assert found["load_share_max"] == pytest.approx((0.75 + 1) / 2)
    assert found["load_share_max_worst"] == 1
    assert found["load_share_min"] == 0
    assert found["dead_experts"] == 2 + 3
    assert found["max_violation"] == pytest.approx((2 + 3) / 2)
    assert found["max_violation_worst"] == 3
    assert found["effective_experts"] == 1
    assert found["experts_per_decision"] == 1
    assert found["overlap"] == 0.75
    p = one.double().softmax(-1)
    assert found["token_entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean() / math.log(4)))
    means = [values.double().softmax(-1).mean(0) for values in (one, two)]
    assert found["mean_entropy"] == pytest.approx(sum(float(-(m * m.log()).sum()) for m in means) / math.log(4) / 2)
    assert all(type(value) is float for value in found.values())


def test_equal_weights_of_k_experts_have_ess_k():
    logits = torch.zeros(5, 6)
    assert routing_metrics(Model(logits, k=3))["effective_experts"] == pytest.approx(3)


def test_padding_does_not_count():
    logits = torch.tensor([[9.0, 0.0]] * 2 + [[0.0, 9.0]] * 2)
    found = routing_metrics(Model(logits, mask=torch.tensor([[True, True, False, False]])))
    assert found["load_share_max"] == 1
    assert found["dead_experts"] == 1
    empty = routing_metrics(Model(logits, mask=torch.zeros(1, 4, dtype=torch.bool)))
    assert all(math.isfinite(value) for value in empty.values())


def test_the_alarm_names_a_collapsed_layer_once(caplog):
    torch.manual_seed(0)
    healthy, collapsed = torch.randn(64, 4), torch.tensor([5.0, 4.0, 0, 0]).expand(64, 4)
    model = Model(healthy, collapsed, k=2)
    with caplog.at_level(logging.WARNING, logger="moe_kit"):
        assert routing_metrics(model)["collapsed_sites"] == 1
        routing_metrics(model)
    assert len(caplog.records) == 1
    assert "layer 1" in caplog.text


def test_few_decisions_and_full_choice_are_no_collapse(caplog):
    with caplog.at_level(logging.WARNING, logger="moe_kit"):
        assert routing_metrics(Model(torch.tensor([[5.0, 0.0]] * 8)))["collapsed_sites"] == 0
        assert routing_metrics(Model(torch.zeros(64, 2), k=2))["collapsed_sites"] == 0
    assert not caplog.records


def test_keys_are_bounded_whatever_the_depth():
    sizes = []
    for layers in (2, 5):
        config = RoutedAdapterConfig.from_preset("mixture_of_lora", num_experts=4, r=2, target_modules="all-linear")
        model = get_peft_model(tiny_llama(layers), config)
        assert routing_metrics(model) == {}
        model(**batch_of())
        sizes.append(len(routing_metrics(model)))
    assert sizes[0] == sizes[1] <= 12
    with pytest.raises(RoutingError, match="no moe_kit routers"):
        routing_metrics(torch.nn.Linear(2, 2))
