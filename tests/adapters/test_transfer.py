"""MHR-z: skills of a trained adapter, frozen, under a fresh table."""

import pytest
import torch
from peft import get_peft_model

from moe_kit import RoutedAdapterConfig, routing_inputs
from moe_kit.adapters import copy_experts
from moe_kit.errors import RoutingError
from tests.tiny import tiny_llama, wake_banks

IDS = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(3))


def config(preset, **more):
    values = {"num_experts": 3, "r": 2, "target_modules": "all-linear", "bank_options": {"heads": 2}, **more}
    return RoutedAdapterConfig.from_preset(preset, top_k=1, **values)


def test_only_the_fresh_table_trains_on_old_skills():
    model = get_peft_model(tiny_llama(), config("mhr", num_tasks=4), adapter_name="skills")
    wake_banks(model)
    skills = {n: v.clone() for n, v in model.state_dict().items() if "bank.skills" in n}
    model.add_adapter("fresh", config("mhr_z"))
    model.set_adapter("fresh")
    copy_experts(model, "skills", "fresh")
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert trainable
    assert all("router.fresh" in name for name in trainable)
    optimizer = torch.optim.SGD(trainable.values(), lr=1.0)
    before = {name: value.detach().clone() for name, value in trainable.items()}
    with routing_inputs(model.train(), task_ids=[0, 0]):
        model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(value, before[name]) for name, value in trainable.items())
    state = model.state_dict()
    for name, value in skills.items():
        assert torch.equal(state[name], value)
        assert torch.equal(state[name.replace("bank.skills", "bank.fresh")], value)


def test_adapters_that_do_not_fit_are_refused():
    model = get_peft_model(tiny_llama(), config("mhr", num_tasks=4), adapter_name="skills")
    model.add_adapter("wide", config("mhr_z", r=4))
    model.add_adapter("fewer", config("mhr_z", target_modules=["q_proj"]))
    for target, match in (("wide", "same bank, rank"), ("fewer", "the same targets"), ("none", "no adapter 'none'")):
        with pytest.raises(RoutingError, match=match):
            copy_experts(model, "skills", target)
    with pytest.raises(RoutingError, match="no routed adapters"):
        copy_experts(tiny_llama(), "a", "b")
