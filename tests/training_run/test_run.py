"""Whole runs on the tiny model: files, resuming, a loss that is not finite, and what must not be overwritten."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from moe_kit.cli import main
from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.training import fitting
from moe_kit.training import run as run_module
from moe_kit.training.guard import TrainingError, last_checkpoint
from moe_kit.training.models import load_model_and_tokenizer
from moe_kit.training.recipe import load_recipe
from moe_kit.training.results import read_results
from moe_kit.training.run import load_run, run


def tiny(output, preset="lora", **train):
    recipe = load_recipe("tiny")
    settings = {"r": 4} if preset == "lora" else {"r": 2, "num_experts": 4, "top_k": 2}
    return dataclasses.replace(
        recipe,
        adapter=dataclasses.replace(recipe.adapter, preset=preset, settings=settings),
        train=dataclasses.replace(recipe.train, max_steps=4, save_steps=2, logging_steps=1, warmup_steps=1, **train),
        data=dataclasses.replace(recipe.data, eval_examples=3),
        output_dir=str(output),
    )


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "log.txt").open("w") as file:
        yield Console(file=file, width=120)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("preset", ["lora", "mixture_of_lora", "remix"])
def test_a_run_leaves_a_folder_that_loads_and_repeats(tmp_path, console, preset):
    recipe = tiny(tmp_path / "out", preset)
    results = run(recipe, console=console)
    folder = tmp_path / "out"
    assert load_recipe(folder) == recipe
    stored = read_results(folder / "results.json")
    assert (stored.ours, stored.constants, stored.zero_shot) == (results.ours, results.constants, results.zero_shot)
    assert json.loads((folder / "results.json").read_text())["mean_gain_points"] == pytest.approx(results.mean_gain)
    assert results.details["steps"] == 4
    model, tokenizer, _ = load_run(folder)
    # generation from the reloaded adapter equals what the run evaluated
    sets = run_module.load_examples(recipe.data, train_examples=run_module.training_examples(recipe))
    scores, _ = run_module.evaluate(model, tokenizer, sets, recipe, console, "again")
    assert scores == results.ours
    text = (tmp_path / "log.txt").read_text()
    for word in ("tokens/s", "s left", "best constant", "zero-shot", "Next:", f"moe-kit generate {folder}"):
        assert word in text
    run(recipe, console=console)
    again = weights(folder)
    assert not list(folder.glob("*.part"))
    assert again.keys() == weights(folder).keys()


def test_training_moves_the_adapter_and_only_the_adapter(tmp_path, console):
    run(tiny(tmp_path / "out"), console=console)
    model, _, _ = load_run(tmp_path / "out")
    fresh, _ = load_model_and_tokenizer("tiny")
    base = dict(fresh.named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
    assert any(w.abs().max() > 0 for name, w in weights(tmp_path / "out").items() if "lora_B" in name)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("preset", ["lora", "mixture_of_lora"])
def test_resuming_ends_bit_identical(tmp_path, console, monkeypatch, preset):
    run(tiny(tmp_path / "whole", preset), console=console)
    recipe = tiny(tmp_path / "broken", preset)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "stepping", lambda reporter, tokens: Interrupt())
        with pytest.raises(KeyboardInterrupt):
            run(recipe, console=console)
    assert last_checkpoint(tmp_path / "broken" / "checkpoints").name == "checkpoint-2"
    run(recipe, resume=True, console=console)
    assert "resuming after step 2" in (tmp_path / "log.txt").read_text()
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_incomplete_checkpoints_are_passed_over(tmp_path, console, caplog):
    run(tiny(tmp_path / "out"), console=console)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert last_checkpoint(checkpoints).name == "checkpoint-4"
    # the three ways in which a kill leaves a checkpoint: cut weights, cut state, no state yet
    file = checkpoints / "checkpoint-4" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert last_checkpoint(checkpoints).name == "checkpoint-2"
    assert "checkpoint-4 is incomplete" in caplog.text
    state = checkpoints / "checkpoint-2" / "trainer_state.json"
    whole = state.read_text()
    state.write_text(whole[:20])
    assert last_checkpoint(checkpoints) is None
    state.unlink()
    assert last_checkpoint(checkpoints) is None
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_resume_refuses_another_recipe(tmp_path, console):
    run(tiny(tmp_path / "out"), console=console)
    with pytest.raises(ConfigError, match=r"sections \['train'\] differ"):
        run(tiny(tmp_path / "out", learning_rate=5.0), resume=True, console=console)


def test_a_loss_that_is_not_finite_stops_with_ids_and_checkpoint(tmp_path, console, monkeypatch):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))

    monkeypatch.setattr(fitting, "stepping", lambda reporter, tokens: Poison())
    with pytest.raises(TrainingError) as error:
        run(tiny(tmp_path / "out"), console=console)
    message = str(error.value)
    assert "the loss is nan at step 4" in message
    assert "chain_sum/" in message or "spell_backward/" in message
    assert str(tmp_path / "out" / "checkpoints" / "checkpoint-2") in message
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_other_peoples_folders_are_left_alone(tmp_path, console):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files of something else"):
        run(tiny(tmp_path / "out"), console=console)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        run(tiny(tmp_path / "file"), console=console)


def test_a_full_disk_is_named_and_the_older_adapter_survives(tmp_path, console, monkeypatch):
    recipe = tiny(tmp_path / "out")
    run(recipe, console=console)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"cannot save the checkpoint of step 2.*No space left"):
        run(recipe, console=console)
    monkeypatch.setattr(run_module, "fit", lambda *args, **kwargs: {})
    with pytest.raises(CheckpointError, match=r"cannot save the adapter to .*No space left"):
        run(recipe, console=console)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_damaged_adapter_is_refused(tmp_path, console, damage):
    run(tiny(tmp_path / "out"), console=console)
    file = tmp_path / "out" / "adapter_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "foreign":
        file.write_bytes(b"not safetensors at all")
    else:
        (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded" if damage != "missing" else "has no adapter_config"):
        load_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preset": "mixture_of_lorra"}, "no preset 'mixture_of_lorra'; did you mean 'mixture_of_lora'"),
        ({"settings": {"rr": 4}}, "adapter.settings.rr"),
        ({"settings": {"r": 0}}, "adapter: .*r.* positive"),
        ({"preset": "mixture_of_lora", "settings": {"top_k": 9}}, "adapter.settings: top_k is 9"),
        ({"settings": {"target_modules": ["nothing"]}}, "adapter: "),
        ({"upper_layers": 3}, "got 3, the model has 2 layers"),
        ({"upper_layers": 1, "settings": {"layers_to_transform": [0]}}, "not both"),
    ],
)
def test_bad_adapter_sections(tmp_path, console, change, words):
    recipe = tiny(tmp_path / "out")
    recipe = dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, **change))
    with pytest.raises(ConfigError, match=words):
        run(recipe, console=console)


@pytest.mark.parametrize(
    ("train", "words"),
    [({"trainer": {"learning_rte": 1}}, "train: .*learning_rte"), ({"schedule": "sawtooth"}, "train: .*sawtooth")],
)
def test_bad_trainer_fields(tmp_path, console, train, words):
    with pytest.raises(ConfigError, match=words):
        run(tiny(tmp_path / "out", **train), console=console)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"credt": "to_go"}, "unknown key 'train.policy.credt': did you mean 'credit'"),
        ({"num_samples": "four"}, r"train.policy.num_samples: got 'four' \(str\), expected int"),
        ({"num_samples": 1}, "train.policy: num_samples is 1"),
        ({"credit": "token"}, "train.policy: credit is 'token'"),
    ],
)
def test_bad_policy_fields_cost_no_baseline(tmp_path, console, monkeypatch, policy, words):
    monkeypatch.setattr(run_module, "evaluate", lambda *args: pytest.fail("a baseline was evaluated first"))
    with pytest.raises(ConfigError, match=words):
        run(tiny(tmp_path / "out", "remix", policy=policy), console=console)


def test_policy_fields_reach_the_trainer(tmp_path):
    _, options = fitting._trainer(_wrapped("remix"), tiny(tmp_path, "remix", policy={"num_samples": 3}))
    assert options["policy"].num_samples == 3


def _wrapped(preset, **settings):
    from moe_kit.training.recipe import AdapterConfig
    from moe_kit.training.wrapping import wrap_model

    model, _ = load_model_and_tokenizer("tiny")
    return wrap_model(model, AdapterConfig(preset=preset, settings={"r": 2, **settings}))


@pytest.mark.parametrize("preset", ["lora", "mixture_of_lora"])
def test_a_run_says_what_it_adapts(tmp_path, console, preset):
    recipe = tiny(tmp_path / "out", preset)
    settings = {**recipe.adapter.settings, "target_modules": "all-linear"}
    run(
        dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, settings=settings, upper_layers=1)),
        console=console,
    )
    text = " ".join((tmp_path / "log.txt").read_text().split())
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert f"adapts {', '.join(f'{name} (1)' for name in names)} " in text


def test_what_is_adapted_counts_base_experts_too():
    from moe_kit.training.recipe import AdapterConfig
    from moe_kit.training.wrapping import matched, wrap_model
    from tests.tiny import tiny_moe

    settings = {"r": 2, "target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]}
    model = wrap_model(tiny_moe("Mixtral"), AdapterConfig(preset="mixture_of_lora", settings=settings))
    assert sorted(matched(model).split(", ")) == ["down_proj (2)", "q_proj (2)"]


# closing tags that open nothing are what rich cannot parse; a code of an emoji is text as well
BRACKETS = "[/INST] is [red] :smile: [/bold]\\"


def test_text_in_brackets_is_text(tmp_path, capsys):
    """Questions, answers, tasks and folders are shown as they are, and nothing of them is taken for markup."""
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{index} {BRACKETS}", "completion": "[/a] :+1:", "task": "[/task]"} for index in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "[bold]out[/i]"
    recipe = tiny(folder, "mixture_of_lora", trainer={})
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, tasks=(), file=str(data), eval_examples=3),
        eval=dataclasses.replace(recipe.eval, compare_row={"note": "[/stored]"}, show=3),
    )
    run(recipe)
    text = capsys.readouterr().out
    unwrapped = "".join(text.split())
    assert "[/a]:+1" in unwrapped, "the best constant answer"
    assert "[/INST]is[red]:smile:[/bold]\\" in unwrapped
    assert "(expected'[/a]:+1:')" in unwrapped
    assert f"Savedto{folder}.".replace(" ", "") in unwrapped
    assert "[/task]" in unwrapped
    assert main(["eval", str(folder)]) == 0
    unwrapped = "".join(capsys.readouterr().out.split())
    assert "[bold]out[/i]" in unwrapped
    assert "[/task]" in unwrapped
    assert main(["inspect", str(folder)]) == 0


def test_compare_trains_lora_at_the_active_rank(tmp_path, console):
    recipe = tiny(tmp_path / "out", "mixture_of_lora")
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, compare=True, zero_shot=False))
    results = run(recipe, console=console)
    assert results.lora.keys() == results.ours.keys()
    assert results.lora_note == "same budget, this run"
    assert "plain LoRA of rank 4" in (tmp_path / "log.txt").read_text()


def test_upper_layers_adapt_only_those(tmp_path):
    from moe_kit.training.recipe import AdapterConfig
    from moe_kit.training.wrapping import wrap_model

    for preset in ("lora", "mixture_of_lora"):
        model, _ = load_model_and_tokenizer("tiny")
        model = wrap_model(model, AdapterConfig(preset=preset, upper_layers=1, settings={"r": 2}))
        trained = {name.split("layers.")[1][0] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"1"}


@pytest.mark.parametrize("name", ["quickstart", "quickstart_lora", "quickstart_remix", "tiny"])
def test_shipped_adapter_sections_fit_a_model(name):
    from moe_kit.training.wrapping import adapter_config

    model, _ = load_model_and_tokenizer("tiny")
    section = load_recipe(name).adapter
    # the tiny model has two layers
    found = adapter_config(model, dataclasses.replace(section, upper_layers=1 if section.upper_layers else None))
    for key, value in section.settings.items():
        if key != "target_modules":
            assert getattr(found, key) == value


def test_quickstarts_share_their_data_and_layers():
    recipes = [load_recipe(name) for name in ("quickstart", "quickstart_lora", "quickstart_remix")]
    for other in recipes[1:]:
        assert other.data == recipes[0].data
        assert other.eval == dataclasses.replace(recipes[0].eval, compare_row=other.eval.compare_row)
        assert (other.model, other.adapter.upper_layers) == (recipes[0].model, recipes[0].adapter.upper_layers)
    ours, lora = (recipe.adapter.settings for recipe in recipes[:2])
    assert ours["r"] * ours["top_k"] == lora["r"]


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    script = Path(__file__).parents[2] / "train" / "finetune.py"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    words += ["tiny", "--output_dir", str(tmp_path / "out"), "--train.max_steps", "2", "--train.save_steps", "1"]
    words += ["--train.warmup_steps", "1", "--data.eval_examples", "2", "--eval.zero_shot", "False"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_results(tmp_path / "out" / "results.json").details["processes"] == 2
    # only the first process prints
    assert done.stdout.count("1/4") == 1
