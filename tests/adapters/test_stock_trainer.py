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
