"""Combinations that would go wrong in silence are refused, with the way out in the message."""

import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

from moe_kit import ConfigError, RoutedAdapterConfig, RoutedTrainer, RoutingError, force_experts, record_routing
from tests.tiny import batch_of, tiny_llama, wake_banks


def model_of(preset="mixture_of_lora", **overrides):
    values = dict(num_experts=4, top_k=2, r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), RoutedAdapterConfig.from_preset(preset, **{**values, **overrides}), "skills")
    wake_banks(model)
    return model


def test_remix_with_ranks_of_their_own_needs_routers_of_their_own():
    with pytest.raises(ConfigError, match="router_sharing='none'"):
        model_of("remix", rank_pattern={"k_proj": 4})
    model = model_of("remix", rank_pattern={"k_proj": 4}, router_sharing="none").eval()
    seen = {}
    for name, module in model.named_modules():
        if hasattr(module, "site"):
            seen[name] = float(module(torch.randn(1, 3, 16)).weights_NK[0, 0])
    assert {round(value, 4) for name, value in seen.items() if "q_proj" in name} == {1.0}
    assert {round(value, 4) for name, value in seen.items() if "k_proj" in name} == {0.7071}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ids_BK=[0, 1]), "one row for each batch row"),
        (dict(ids_BK=torch.zeros(1, 2)), "whole numbers"),
        (dict(ids_BK=[[0, 1]], sites=["nowhere"]), "no site of this model"),
        ({}, "not both and not none"),
    ],
)
def test_forced_experts_are_checked(arguments, message):
    with pytest.raises(RoutingError, match=message), force_experts(model_of(), **arguments):
        pass


def test_forced_experts_may_be_lists():
    model, batch = model_of().eval(), batch_of()
    with torch.no_grad(), record_routing(model) as record, force_experts(model, ids_BK=[[3, 1]]):
        model(**batch)
    assert all(ids.tolist() == [[3, 1]] * 12 for ids in record.values())


def test_a_policy_refuses_another_loss(tmp_path):
    data = [{name: value[0] for name, value in batch_of().items()}] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", label_smoothing_factor=0.1
    )
    with pytest.raises(ConfigError, match="different losses"):
        RoutedTrainer(model=model_of("remix"), args=arguments, train_dataset=data).train()


def test_generation_in_training_mode_obeys_the_prompts_decision():
    model = model_of(scope="sequence").train()
    prompt = batch_of(rows=1)
    prompt.pop("labels")
    seen = []
    handles = [
        module.register_forward_hook(lambda module, args, routing: seen.append(routing.expert_ids_NK.tolist()))
        for name, module in model.named_modules()
        if hasattr(module, "site") and "layers.0." in name
    ]
    with torch.no_grad():
        model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    assert all(ids == seen[0] for ids in seen)
