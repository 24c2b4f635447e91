"""Step state under trainers that know nothing of routers: stock `transformers.Trainer`, accumulation, fused AdamW."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from moe_kit import RoutedAdapterConfig
from moe_kit.routing import Router
from tests.tiny import tiny_llama

RATE = 0.01


def examples(count=24, length=8):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (count, length), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def steppers(model):
    return [module.stepper for module in model.modules() if isinstance(module, Router)]


def wrapped(preset, **more):
    values = {"num_experts": 4, "top_k": 2, "r": 2, "target_modules": "all-linear", **more}
    return get_peft_model(tiny_llama(), RoutedAdapterConfig.from_preset(preset, **values), adapter_name="default")


def train(model, folder, **more):
    values = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    Trainer(model=model, args=TrainingArguments(str(folder), **{**values, **more}), train_dataset=examples()).train()
    return model


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_the_bias_moves_once_an_optimizer_step(tmp_path, optimizer):
    model = wrapped("loss_free", stepper_options={"rate": RATE})
    moves = []
    update = type(steppers(model)[0]).update
    for stepper in steppers(model):
        stepper.update = lambda total, stepper=stepper: (moves.append(total.sum()), update(stepper, total))
    train(model, tmp_path, optim=optimizer)
    assert len(moves) == 3 * len(steppers(model))
    # two micro-batches of two rows of eight tokens, two experts each
    assert all(move == 2 * 2 * 8 * 2 for move in moves)
    for stepper in steppers(model):
        assert 0 < stepper.bias.abs().max() <= 3 * RATE + 1e-6
        assert stepper.counter is None


def test_checkpointing_counts_once(tmp_path):
    plain = train(wrapped("loss_free"), tmp_path)
    recomputed = train(
        wrapped("loss_free"),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert all(torch.equal(one.bias, two.bias) for one, two in zip(steppers(plain), steppers(recomputed)))


def test_biases_are_saved_with_the_adapter(tmp_path):
    model = train(wrapped("loss_free"), tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    for one, two in zip(steppers(model), steppers(loaded)):
        assert one.bias.abs().sum() > 0
        assert torch.equal(one.bias, two.bias)


def test_thresholds_and_controllers_move_too(tmp_path):
    model = train(wrapped("expert_choice", select_options={"threshold": "ema"}), tmp_path)
    selects = [module.select for module in model.modules() if isinstance(module, Router)]
    assert all(select.steps == 3 for select in selects)
    controlled = steppers(train(wrapped("remoe"), tmp_path))
    assert {float(stepper.strength) for stepper in controlled} != {1e-8}
    assert len({float(stepper.strength) for stepper in controlled}) == 1, "one lambda for the model"


def test_a_router_freezes_under_the_stock_trainer(tmp_path):
    model = wrapped("mixture_of_lora", router_freeze_after=0)
    before = {name: value.clone() for name, value in model.named_parameters() if "adapter" in name}
    train(model, tmp_path, weight_decay=0.1)
    for name, value in model.named_parameters():
        if name in before:
            assert torch.equal(value, before[name]) == ("router" in name), name


MOVING = {
    "loss_free": {},
    "loss_free/quantile": {"stepper_options": {"rule": "quantile", "bins": 50}},
    "expert_choice": {"select_options": {"threshold": "ema"}},
    "flylora": {},
}


def moving_values(model):
    """Every value that the choice of experts depends on: parameters, biases, thresholds."""
    return {
        name: value.clone()
        for name, value in model.named_parameters()
        if "router" in name and not name.endswith("freeze.steps")
    }


@pytest.mark.parametrize("freeze", [{"freeze_router": True}, {"router_freeze_after": 0}], ids=str)
@pytest.mark.parametrize("case", MOVING)
def test_what_moves_once_a_step_freezes_with_the_router(case, freeze, tmp_path):
    model = wrapped(case.split("/")[0], **MOVING[case], **freeze)
    before = moving_values(model)
    train(model, tmp_path)
    after = moving_values(model)
    assert before
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    banks = [value for name, value in model.named_parameters() if "bank" in name and name.endswith(".B")]
    assert all(value.any() for value in banks), "the experts train on"
    # and without freezing they do move
    model = wrapped(case.split("/")[0], **MOVING[case])
    before = moving_values(model)
    train(model, tmp_path)
    assert any(not torch.equal(before[name], value) for name, value in moving_values(model).items() if value.dim() == 1)


def test_a_router_moves_until_it_freezes(tmp_path):
    biases = []
    for after in (1, 2, None):
        (bias, *_) = [
            s.bias.clone() for s in steppers(train(wrapped("loss_free", router_freeze_after=after), tmp_path))
        ]
        biases.append(bias)
    assert all(bias.any() for bias in biases)
    assert float(biases[0].abs().max()) == pytest.approx(1e-3), "one step of the sign rule"
    assert not torch.equal(biases[1], biases[2])


def test_an_adapter_for_inference_keeps_its_biases(tmp_path):
    """It runs beside another one that trains."""
    saved = wrapped("loss_free", target_modules=["q_proj"])
    saved.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", adapter_name="old")
    config = RoutedAdapterConfig.from_preset("loss_free", num_experts=4, top_k=2, r=2, target_modules=["q_proj"])
    model.add_adapter("new", config)
    model.base_model.set_adapter(["old", "new"])
    for name, value in model.named_parameters():
        value.requires_grad_(".new." in name)
    train(model, tmp_path)
    routers = {m.site: m.stepper for m in model.modules() if isinstance(m, Router)}
    assert {site.rpartition(".")[2]: bool(stepper.bias.any()) for site, stepper in routers.items()} == {
        "old": False,
        "new": True,
    }
