"""Optimizers made for LoRA act on experts as they act on LoRAs."""

import peft.optimizers
import pytest
import torch
from peft import LoraConfig, get_peft_model

import moe_kit
from moe_kit import ConfigError, RoutedAdapterConfig
from tests.conformance.common import take_loras
from tests.tiny import batch_of, tiny_llama, tiny_moe
from tests.tolerances import assert_close

TARGETS = ["q_proj", "v_proj", "up_proj"]


def lora(**more):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **more)).train()


def routed(preset="mixture_of_lora", base=None, **more):
    torch.manual_seed(0)
    values = {"num_experts": 4, "top_k": 2, "r": 3, "lora_alpha": 6.0, "target_modules": TARGETS}
    model = get_peft_model(base or tiny_llama(), RoutedAdapterConfig.from_preset(preset, **{**values, **more}))
    return model.train()


def one_expert(model):
    """A mixture of one expert with the weights of a LoRA."""
    alone = routed(num_experts=1, top_k=1, losses={}, weight="indicator")
    take_loras(alone, model)
    return alone


def wake(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or name.endswith(".B"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model


def rates(model, optimizer):
    names = {id(value): name for name, value in model.named_parameters()}
    return {names[id(v)]: group["lr"] for group in optimizer.param_groups for v in group["params"]}


def loraplus(model):
    return peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)


@pytest.mark.parametrize("preset", ["mixture_of_lora", "hydralora", "flylora", "loss_free"])
def test_loraplus_gives_b_a_rate_of_its_own(preset):
    model = routed(preset)
    found = rates(model, loraplus(model))
    assert found.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    assert all((rate == 16e-3) == name.endswith(".B") for name, rate in found.items())
    plain = lora()
    assert all((rate == 16e-3) == ("lora_B" in name) for name, rate in rates(plain, loraplus(plain)).items())


def test_loraplus_on_the_experts_of_a_base():
    model = routed(base=tiny_moe("Qwen3Moe"), target_modules=None, target_parameters=["experts.down_proj"])
    found = rates(model, loraplus(model))
    assert {name[-1]: rate for name, rate in found.items()} == {"A": 1e-3, "B": 16e-3}


@pytest.mark.parametrize(
    "make",
    [loraplus, lambda model: peft.optimizers.create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)],
    ids=["loraplus", "lorafa"],
)
def test_one_expert_is_trained_as_the_lora(make):
    model = wake(lora())
    alone = one_expert(model)
    for each in (model, alone):
        optimizer = make(each)
        for _ in range(3):
            each(**batch_of()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, module in alone.named_modules():
        if hasattr(module, "moe_adapter_bank"):
            other, bank = model.get_submodule(name), module.moe_adapter_bank["default"]
            for ours, theirs in ((bank.A[0], other.lora_A["default"]), (bank.B[0], other.lora_B["default"])):
                # PEFT projects gradients in bfloat16
                assert_close(name, ours, theirs.weight, torch.bfloat16)


@pytest.mark.parametrize("preset", ["mixture_of_lora", "hydralora"])
def test_lorafa_trains_b_and_routers(preset):
    model = wake(routed(preset))
    optimizer = peft.optimizers.create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model(**batch_of()).loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {n for n in before if n.endswith(".B") or n.endswith("scorer.weight")}
    assert all(torch.equal(model.get_parameter(name).grad, value) for name, value in gradients.items())


@pytest.mark.parametrize("preset", ["flylora", "mhr_mu"])
def test_lorafa_is_refused_where_there_is_no_a(preset):
    more = {"bank_options": {"heads": 2}} if preset == "mhr_mu" else {}
    with pytest.raises(ConfigError, match="LoRA-FA"):
        peft.optimizers.create_lorafa_optimizer(routed(preset, **more), r=3, lora_alpha=6, lr=1e-2)


def test_groups_for_any_optimizer():
    model = routed()
    optimizer = torch.optim.SGD(moe_kit.param_groups(model, 1e-3, router_lr=5e-4, loraplus_lr_ratio=8))
    found = rates(model, optimizer)
    assert {(n.rsplit(".", 1)[1], rate) for n, rate in found.items()} == {("A", 1e-3), ("B", 8e-3), ("weight", 5e-4)}
    plain = lora()
    found = rates(plain, torch.optim.SGD(moe_kit.param_groups(plain, 1e-3, loraplus_lr_ratio=8)))
    assert {("lora_B" in name, rate) for name, rate in found.items()} == {(True, 8e-3), (False, 1e-3)}
