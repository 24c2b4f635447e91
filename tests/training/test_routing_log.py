"""Routing metrics in the log: under our trainer, the stock one and TRL; one warning for a planted collapse, none without."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

import moe_kit
from moe_kit import RoutedAdapterConfig, RoutedTrainer, RoutingError, RoutingMetricsCallback
from moe_kit.routing import Router, routing_metrics
from moe_kit.training import routing_log
from tests.tiny import batch_of, quiet_arguments, tiny_llama

KEYS = {"routing_load_share_max", "routing_effective_experts", "routing_dead_experts", "routing_overlap"}
LOGGED = dict(max_steps=4, logging_steps=2, learning_rate=0.0, per_device_train_batch_size=8)


def model_of(collapsed=(), preset="mixture_of_lora"):
    """Routers of random scores; those of the indices in `collapsed` score all experts alike, so the first two win."""
    config = RoutedAdapterConfig.from_preset(preset, num_experts=4, top_k=2, r=2, target_modules="all-linear")
    model = get_peft_model(tiny_llama(), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for index, router in enumerate(routers(model)):
            router.scorer.weight.normal_(generator=generator)
            if index in collapsed:
                router.scorer.weight.zero_()
    return model.train()


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def examples():
    return [{key: value[0] for key, value in batch_of(rows=1, length=8).items()} for _ in range(4)] + [
        {key: value[row] for key, value in batch_of(rows=12, length=8).items()} for row in range(12)
    ]


class Tracker(TrainerCallback):
    """Like a reporter: sends whatever `logs` holds when its turn comes."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append(dict(logs))


def train(model, folder, kind, **overrides):
    stock = {"callbacks": [RoutingMetricsCallback()]} if kind is Trainer else {}
    arguments = quiet_arguments(folder, **{**LOGGED, **overrides})
    trainer = kind(model=model, args=arguments, train_dataset=examples(), **stock)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], trainer


@pytest.mark.parametrize("kind", [Trainer, RoutedTrainer])
class TestLog:
    def test_keys_stand_beside_the_loss(self, tmp_path, kind, caplog):
        model = model_of()
        lines, trainer = train(model, tmp_path, kind)
        assert len(lines) == 2
        found = routing_metrics(model)
        for line in lines:
            logged = {name for name in line if name.startswith("routing_")}
            assert logged >= KEYS
            assert len(logged) <= 12
        # the last line is about the last pass
        assert {name: lines[-1]["routing_" + name] for name in found} == pytest.approx(found)
        assert json.dumps(trainer.state.log_history, allow_nan=False)
        assert not caplog.records, "healthy routers raise no alarm"

    def test_one_warning_for_all_layers_that_collapsed(self, tmp_path, kind, caplog):
        model = model_of(collapsed=(0, 2, 3, 5, 6))
        lines, _ = train(model, tmp_path, kind)
        assert [line["routing_collapsed_sites"] for line in lines] == [5, 5]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.name.startswith("moe_kit.")
        assert "routing collapsed at " in record.getMessage()
        assert "and 2 more" in record.getMessage()
        assert routers(model)[0].site in record.getMessage()
        # the same layers are no news; another one is
        with torch.no_grad():
            routers(model)[1].scorer.weight.zero_()
        train(model, tmp_path, kind)
        assert len(caplog.records) == 2
        assert routers(model)[1].site in caplog.records[1].getMessage()
        assert routers(model)[0].site not in caplog.records[1].getMessage()
        # called by hand, the metrics say the same in one line
        other = model_of(collapsed=(0, 1))
        other(**batch_of(rows=12, length=8))
        routing_metrics(other)
        assert len(caplog.records) == 3
        assert all(routers(other)[index].site in caplog.records[2].getMessage() for index in (0, 1))

    def test_other_steps_cost_nothing(self, tmp_path, kind, monkeypatch):
        calls = []
        monkeypatch.setattr(routing_log, "routing_metrics", lambda model: calls.append(1) or {"dead_experts": 0.0})
        train(model_of(), tmp_path, kind, max_steps=5, logging_steps=5, eval_strategy="no")
        assert len(calls) == 1

    def test_what_has_no_value_is_left_out(self, tmp_path, kind, monkeypatch):
        """Routing without logits has no entropy, and NaN is no JSON."""
        found = {"token_entropy": float("nan"), "dead_experts": 1.0}
        monkeypatch.setattr(routing_log, "routing_metrics", lambda model: found)
        lines, trainer = train(model_of(), tmp_path, kind)
        assert "routing_token_entropy" not in lines[0]
        assert lines[0]["routing_dead_experts"] == 1
        assert json.dumps(trainer.state.log_history, allow_nan=False)


def test_evaluation_lines_have_none(tmp_path):
    model = model_of()
    trainer = Trainer(
        model=model,
        args=quiet_arguments(tmp_path, **LOGGED, eval_strategy="steps", eval_steps=2),
        train_dataset=examples(),
        eval_dataset=examples()[:4],
        callbacks=[RoutingMetricsCallback()],
    )
    trainer.train()
    for line in trainer.state.log_history:
        assert any(name.startswith("routing_") for name in line) == ("loss" in line)
    assert any("eval_loss" in line for line in trainer.state.log_history)


def test_trackers_see_them(tmp_path):
    """RoutedTrainer's always do; under the stock Trainer the callback must stand before them, as its docstring says."""
    ours, stock = Tracker(), Tracker()
    RoutedTrainer(
        model=model_of(), args=quiet_arguments(tmp_path, **LOGGED), train_dataset=examples(), callbacks=[ours]
    ).train()
    trainer = Trainer(
        model=model_of(), args=quiet_arguments(tmp_path, **LOGGED), train_dataset=examples(), callbacks=[stock]
    )
    trainer.callback_handler.callbacks.insert(0, RoutingMetricsCallback())
    trainer.train()
    for tracker in (ours, stock):
        assert set(tracker.sent[0]) >= KEYS


def test_both_at_once_measure_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(routing_log, "routing_metrics", lambda model: calls.append(1) or {"dead_experts": 0.0})
    RoutedTrainer(
        model=model_of(),
        args=quiet_arguments(tmp_path, **LOGGED),
        train_dataset=examples(),
        callbacks=[RoutingMetricsCallback()],
    ).train()
    assert len(calls) == 2


def test_a_policy_logs_its_own_figures_as_well(tmp_path):
    lines, _ = train(model_of(preset="remix"), tmp_path, RoutedTrainer)
    assert {"policy_loss_std", *KEYS} <= set(lines[-1])


def test_without_routers(tmp_path):
    def plain():
        return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))

    lines, _ = train(plain(), tmp_path, RoutedTrainer)
    assert not any(name.startswith("routing_") for name in lines[0])
    with pytest.raises(RoutingError, match="no moe_kit routers"):
        train(plain(), tmp_path, Trainer)


def test_under_trl(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    trainer = SFTTrainer(
        model=model_of(collapsed=(1,)),
        args=SFTConfig(
            str(tmp_path),
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=8,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9, 10]] * 8}),
        processing_class=tokenizer,
        callbacks=[RoutingMetricsCallback()],
    )
    trainer.train()
    assert set(trainer.state.log_history[0]) >= KEYS
    # the eight rows are equal, so a router of random scores has six different decisions at most; one has a single one
    assert trainer.state.log_history[0]["routing_collapsed_sites"] >= 1


def test_it_is_public():
    assert moe_kit.RoutingMetricsCallback is RoutingMetricsCallback
    assert "RoutingMetricsCallback" in moe_kit.__all__
