"""Checkpoints: a resumed run ends bit for bit like one that never stopped, whatever stopped it."""

import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from moe_kit import CheckpointError, RoutedTrainer
from moe_kit.training.guard import TrainingError, last_checkpoint
from moe_kit.training.trainer import PolicyConfig
from tests.conformance.common import NAME, config, routed, rows
from tests.tiny import tiny_llama

STEPS = 4
RUNS = {
    "stock": (Trainer, {}, {}),
    "routed": (RoutedTrainer, {}, {}),
    "sampled": (RoutedTrainer, {"preset": "remix"}, {"policy": PolicyConfig(num_samples=2)}),
    "balanced": (RoutedTrainer, {"preset": "loss_free"}, {}),
}


def arguments(folder, **overrides):
    values = dict(
        max_steps=STEPS,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_steps=1,
        disable_tqdm=True,
        learning_rate=1e-2,
        warmup_steps=2,
        logging_steps=1,
    )
    return TrainingArguments(str(folder), **{**values, **overrides})


def build(kind, folder, callbacks=(), data=None, eval_data=None, **overrides):
    trainer_class, options, more = RUNS[kind]
    torch.manual_seed(5)
    model = routed(dropout=0.1, **options).train()
    return trainer_class(
        model=model,
        args=arguments(folder, **overrides),
        train_dataset=data or rows(12),
        eval_dataset=eval_data,
        callbacks=list(callbacks),
        **more,
    )


def end_state(trainer):
    state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        state.update({f"optimizer.{index}.{key}": torch.as_tensor(value).clone() for key, value in entry.items()})
    return state


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def assert_same(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    ends = {}

    def end(kind):
        if kind not in ends:
            trainer = build(kind, tmp_path_factory.mktemp(kind))
            trainer.train()
            ends[kind] = end_state(trainer)
        return ends[kind]

    return end


@pytest.mark.parametrize("kind", RUNS)
def test_resume_is_bit_identical(tmp_path, uninterrupted, kind):
    build(kind, tmp_path, [Stop(2)]).train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    again = build(kind, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    assert_same(end_state(again), uninterrupted(kind))


def test_rotation_and_names(tmp_path):
    trainer = build("routed", tmp_path, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    files = {path.name for path in (tmp_path / "checkpoint-4").rglob("*")}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"}


def test_best_checkpoint(tmp_path):
    trainer = build(
        "routed", tmp_path, eval_data=rows(4), eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).is_dir()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.conformance import test_resume as resume

class Killed(resume.RoutedTrainer):
    def _save_rng_state(self, folder):
        super()._save_rng_state(folder)
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

resume.RUNS["routed"] = (Killed, {}, {})
resume.build("routed", Path(sys.argv[1])).train()
"""


def test_killed_while_saving(tmp_path, uninterrupted):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, cwd=root)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".checkpoint-3.part", "checkpoint-1", "checkpoint-2"]
    again = build("routed", tmp_path)
    again.train(resume_from_checkpoint=True)
    assert_same(end_state(again), uninterrupted("routed"))
    assert not list(tmp_path.glob(".checkpoint*")), "the next save of that step replaces what was left"


def test_full_disk(tmp_path):
    """The kernel refuses a file beyond a limit, as a full disk does; the checkpoint before stays whole."""

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(CheckpointError, match=r"step 3.*Make room.*checkpoint-2"):
            build("routed", tmp_path, [Fill()]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    again = build("routed", tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS


def test_a_loss_that_is_not_finite(tmp_path):
    data = [{**row, "example_ids": index + 100} for index, row in enumerate(rows(12))]

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                for parameter in model.parameters():
                    parameter.data.fill_(float("nan"))

    def collate(examples):
        ids = [example["example_ids"] for example in examples]
        return {**default_data_collator([{k: v for k, v in e.items() if k != "example_ids"} for e in examples]),
                "example_ids": ids}  # fmt: skip

    trainer = build(
        "routed", tmp_path, [Poison()], data, remove_unused_columns=False, train_sampling_strategy="sequential"
    )
    trainer.data_collator = collate
    with pytest.raises(TrainingError, match=r"nan at step 3; batch: \[104, 105\].*checkpoint-2"):
        trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


class TestBadCheckpoints:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("whole")
        build("routed", folder, [Stop(2)]).train()
        return folder

    @pytest.mark.parametrize(
        "damage", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth"]
    )
    def test_a_cut_off_file(self, folder, tmp_path, damage):
        copied = shutil.copytree(folder, tmp_path / "copied")
        (path,) = (copied / "checkpoint-2").rglob(damage)
        path.write_bytes(path.read_bytes()[:-40])
        assert last_checkpoint(copied).name == "checkpoint-1"
        with pytest.raises(CheckpointError, match=r"checkpoint-2 is no whole checkpoint.*checkpoint-1"):
            build("routed", copied).train(resume_from_checkpoint=str(copied / "checkpoint-2"))

    def test_nothing_to_resume(self, tmp_path):
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            build("routed", tmp_path).train(resume_from_checkpoint=True)

    def test_nothing_is_unpickled(self, folder, tmp_path):
        """Every file that the Trainer reads with torch.load is read with weights_only."""
        marker = tmp_path / "executed"

        class Payload:
            def __reduce__(self):
                return (open, (str(marker), "w"))

        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            copied = shutil.copytree(folder, tmp_path / name)
            torch.save({"state": Payload()}, copied / "checkpoint-2" / name)
            with pytest.raises(pickle.UnpicklingError, match=r"(?i)weights"):
                build("routed", copied).train(resume_from_checkpoint=str(copied / "checkpoint-2"))
            assert not marker.exists(), name
        copied = shutil.copytree(folder, tmp_path / "arguments")
        (copied / "checkpoint-2" / "training_args.bin").write_bytes(pickle.dumps(Payload()))
        build("routed", copied).train(resume_from_checkpoint=str(copied / "checkpoint-2"))
        assert not marker.exists()


def test_a_checkpoint_is_an_adapter_folder(tmp_path):
    from peft import PeftModel

    trainer = build("routed", tmp_path)
    trainer.train()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / f"checkpoint-{STEPS}" / NAME)
    assert loaded.peft_config["default"].num_experts == config().num_experts
