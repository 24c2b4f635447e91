"""Early stopping, the best checkpoint and the hub, through the Trainer's own options and with routed adapters."""

from pathlib import Path

import pytest
import torch
import transformers.trainer as trainer_module
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from moe_kit import RoutedTrainer
from moe_kit.training.trainer import PolicyConfig
from tests.conformance.common import NAME, adapter_state, routed, rows

# evaluation after each step; the best is that of step 2, and two worse ones end the run
SCORES = (3.0, 1.0, 2.0, 2.5, 0.5)
RUNS = {
    "stock": (Trainer, {}, {}),
    "routed": (RoutedTrainer, {}, {}),
    "balanced": (RoutedTrainer, {"preset": "loss_free"}, {}),
    "sampled": (RoutedTrainer, {"preset": "remix"}, {"policy": PolicyConfig(num_samples=2)}),
}


class Keep(TrainerCallback):
    """Copies the adapter after each step."""

    def __init__(self, name):
        self.name, self.states = name, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states[state.global_step] = {key: value.clone() for key, value in weights_of(model, self.name).items()}


def build(kind, folder, callbacks=(), name=NAME, **overrides):
    trainer_class, options, more = RUNS[kind]
    scores = iter(SCORES)
    values = dict(
        max_steps=len(SCORES),
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=0.05,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
    )
    return trainer_class(
        model=routed(name=name, **options).train(),
        args=TrainingArguments(str(folder), **{**values, **overrides}),
        train_dataset=rows(8),
        eval_dataset=rows(2),
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=list(callbacks),
        **more,
    )


def weights_of(model, name):
    return {key.replace(f".{name}.", "."): value for key, value in adapter_state(model, name).items()}


# the stock Trainer looks for the best weights in the checkpoint itself, where only an adapter named "default" is
@pytest.mark.parametrize(
    ("kind", "name"),
    [("stock", "default"), *((kind, name) for kind in RUNS if kind != "stock" for name in (NAME, "default"))],
)
def test_early_stopping_restores_the_best(tmp_path, kind, name):
    keep = Keep(name)
    trainer = build(kind, tmp_path, [keep, EarlyStoppingCallback(early_stopping_patience=2)], name=name)
    trainer.train()
    assert trainer.state.global_step == 4, "the fifth step would have been the best"
    best = Path(trainer.state.best_model_checkpoint)
    assert best == tmp_path / "checkpoint-2"
    found = weights_of(trainer.model, name)
    assert any(not torch.equal(value, keep.states[4][key]) for key, value in found.items()), "it had moved on"
    for key, value in found.items():
        assert torch.equal(value, keep.states[2][key]), key
    (stored,) = best.rglob("adapter_model.safetensors")
    assert load_file(stored).keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in load_file(stored).items())


def test_the_best_survives_rotation(tmp_path):
    trainer = build("routed", tmp_path, save_total_limit=1)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-5")
    trainer = build("routed", tmp_path / "four", save_total_limit=1, max_steps=4)
    trainer.train()
    # the stock Trainer takes the last one away when training ends
    assert [path.name for path in (tmp_path / "four").iterdir()] == ["checkpoint-2"]


class Hub:
    """Stands in for the client of the hub, and keeps what it is given."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, name, **kwargs):
        return type("Url", (), {"repo_id": f"someone/{name}"})()

    def upload_folder(self, repo_id, folder_path, **kwargs):
        files = {p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()}
        self.uploads.append((repo_id, files, kwargs))
        return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()


@pytest.mark.parametrize("kind", ["stock", "routed"])
def test_push_to_hub(tmp_path, monkeypatch, kind):
    hub = Hub()
    monkeypatch.setattr(trainer_module, "hf_api", lambda *args, **kwargs: hub)
    folder = tmp_path / "mine"
    trainer = build(kind, folder, name="default", max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    ((repo, files, options),) = hub.uploads
    assert repo == "someone/mine"
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert "checkpoint-*" in options["ignore_patterns"]


def test_push_with_every_checkpoint(tmp_path, monkeypatch):
    """What is pushed while training is the checkpoint that was just written, not the folder it was written in."""
    hub = Hub()
    monkeypatch.setattr(trainer_module, "hf_api", lambda *args, **kwargs: hub)
    options = dict(push_to_hub=True, hub_strategy="all_checkpoints", max_steps=2)
    build("routed", tmp_path / "mine", name="default", **options).train()
    folders = [kwargs["path_in_repo"] for _, _, kwargs in hub.uploads if "path_in_repo" in kwargs]
    assert folders == ["checkpoint-1", "checkpoint-2"]
    for _, files, kwargs in hub.uploads:
        if "path_in_repo" in kwargs:
            assert files >= {"adapter_model.safetensors", "trainer_state.json", "optimizer.pt"}
