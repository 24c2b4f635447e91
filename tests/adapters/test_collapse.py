"""Constant routing becomes a LoRA with the same output, which PEFT merges."""

import copy

import pytest
import torch
from peft import get_peft_model

from moe_kit import RoutedAdapterConfig, routing_inputs
from moe_kit.adapters import collapse_to_lora
from moe_kit.errors import RoutingError
from moe_kit.routing import force_experts
from tests.tiny import tiny_llama, wake_banks
from tests.tolerances import assert_close

IDS = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(3))


def wrapped(preset, **more):
    config = RoutedAdapterConfig.from_preset(preset, r=3, target_modules="all-linear", **more)
    model = get_peft_model(tiny_llama(), config, adapter_name="skills_a").eval()
    wake_banks(model)
    return model


def test_averaged_skills():
    model = wrapped("mhr_mu", num_experts=4, bank_options={"heads": 2})
    expected = model(input_ids=IDS).logits
    lora = collapse_to_lora(model)
    assert lora.active_adapter == "skills_a"
    assert_close("lora", lora.eval()(input_ids=IDS).logits, expected)
    assert_close("merged", lora.merge_and_unload()(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("preset", ["poly", "mhr"])
def test_one_row_of_a_table(preset):
    model = wrapped(preset, num_experts=4, num_tasks=3, bank_options={"heads": 1 if preset == "poly" else 2})
    for name, value in model.named_parameters():
        if "router" in name:
            torch.nn.init.normal_(value)
    rows = {}
    for task in (0, 2):
        with routing_inputs(model, task_ids=[task] * 2):
            rows[task] = model(input_ids=IDS).logits
    other = copy.deepcopy(model)
    assert_close("task 2", collapse_to_lora(model, task_id=2).eval()(input_ids=IDS).logits, rows[2])
    assert_close("task 0", collapse_to_lora(other, task_id=0, name="zero").eval()(input_ids=IDS).logits, rows[0])


@pytest.mark.parametrize("preset", ["mixture_of_lora", "hydralora"])
def test_weights_that_the_caller_names(preset):
    model = wrapped(preset, num_experts=4, top_k=2)
    weights = torch.tensor([0.5, 0.0, 0.2, 0.3])
    with force_experts(model, weights_BE=weights[None]):
        expected = model(input_ids=IDS).logits
    other = copy.deepcopy(model)
    assert_close("weights", collapse_to_lora(model, weights=weights).eval()(input_ids=IDS).logits, expected)
    with force_experts(other, weights_BE=torch.full((1, 4), 0.25)):
        expected = other(input_ids=IDS).logits
    assert_close("mean", collapse_to_lora(other, weights="mean").eval()(input_ids=IDS).logits, expected)


def test_different_numbers_of_experts_give_different_ranks():
    model = wrapped("mola", expert_layout=[2, 4], top_k=2)
    lora = collapse_to_lora(model, weights="mean").eval()
    ranks = {module.r["skills_a"] for module in lora.modules() if hasattr(module, "lora_A") and hasattr(module, "r")}
    assert ranks == {6, 12}


def test_what_is_refused_leaves_the_model_as_it_was():
    model = wrapped("mixture_of_lora", num_experts=4)
    expected = model(input_ids=IDS).logits
    for arguments, match in (
        ({}, "depends on the input"),
        ({"weights": "median"}, "median"),
        ({"weights": torch.ones(3)}, "one for each expert"),
    ):
        with pytest.raises(RoutingError, match=match):
            collapse_to_lora(model, **arguments)
        assert torch.equal(model(input_ids=IDS).logits, expected)
    with pytest.raises(RoutingError, match="collapse_to_lora"):
        model.merge_and_unload()
    with pytest.raises(RoutingError, match="RankOneBank"):
        collapse_to_lora(wrapped("flylora", num_experts=4, top_k=2), weights="mean")
    with pytest.raises(RoutingError, match="task id 9"):
        collapse_to_lora(wrapped("poly", num_tasks=2), task_id=9)
