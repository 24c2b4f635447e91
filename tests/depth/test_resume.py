"""A run of a layer-router recipe that was interrupted ends, bit for bit, like one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import moe_kit.training.depth as depth
from moe_kit import CheckpointError, ConfigError
from moe_kit.training.depth import load_depth_recipe, search_layers, train_layers
from moe_kit.training.recipe import shipped_configs

FOLDER = next(iter(shipped_configs().values())).parent / "depth"
TASK = dict(name="chain_sum", settings=dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1))


def tiny_values(name, folder, steps=4):
    """A shipped recipe on the tiny random model, `steps` steps a phase, a state after every second one."""
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    values["model"]["name"] = "tiny"
    values["data"].update(tasks=[TASK], eval_examples=6, max_length=128)
    values.update(base_adapter=None, output_dir=str(folder), eval_batch_size=3, save_steps=2)
    settings = dict(simulations=3, correct=1e-6, batch_size=3)
    output = str(folder.parent / "labels.jsonl")
    values.setdefault("search", {}).update(output=output, questions=6, scorer="likelihood", settings=settings)
    if values.get("lora"):
        # dropout makes the result depend on the random state
        values["lora"]["lora_dropout"] = 0.2
    for phase in values.get("phases", []):
        phase["batch_size"] = 2
        phase["settings"] = {**phase.get("settings", {}), "steps": steps, "warmup_steps": 1}
    return values


class Stopped(Exception):
    pass


def stop_at(kind, step):
    """Fails like a killed process: nothing is kept that was not kept before."""

    def on_step(present, index, loss):
        if (present, index) == (kind, step):
            raise Stopped

    return on_step


def contents(folder):
    """Everything that a run leaves behind."""
    files = sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    found = {}
    for name in files:
        path = folder / name
        if name.suffix == ".safetensors":
            found[str(name)] = {key: value.tolist() for key, value in load_file(path).items()}
        elif name.name != "recipe.yaml":
            found[str(name)] = path.read_text()
    return found


@pytest.mark.parametrize(
    ("name", "kind", "step"),
    [
        ("dr_llm", "supervised", 2),
        # before the first state, in the middle of a phase, at its last step, in the next phase
        ("first", "end_to_end", 0),
        ("first", "end_to_end", 2),
        ("first", "end_to_end", 3),
        ("first", "lora", 0),
        ("first", "lora", 2),
        ("informed", "forecasters", 2),
        ("informed", "end_to_end", 2),
        ("flexi", "end_to_end", 2),
        ("mod", "end_to_end", 3),
        ("policy", "policy", 2),
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(name, kind, step, tmp_path):
    whole, broken = (load_depth_recipe(tiny_values(name, tmp_path / part)) for part in ("whole", "broken"))
    if name == "dr_llm":
        search_layers(whole)
    expected = train_layers(whole)
    with pytest.raises(Stopped):
        train_layers(broken, on_step=stop_at(kind, step))
    seen = []
    assert train_layers(broken, resume=True, on_step=lambda *values: seen.append(values[:2])) == expected
    # states are kept at steps 2 and 4
    assert seen[0] == (kind, step // 2 * 2)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert not (tmp_path / "broken" / "progress").exists()
    # a finished run is not run again
    assert train_layers(broken, resume=True, on_step=stop_at(kind, 0)) == expected


@pytest.mark.parametrize("name", ["first", "static"])
def test_killed_between_phases_and_in_the_evaluation(name, tmp_path, monkeypatch):
    values = tiny_values(name, tmp_path / "whole")
    if name == "static":
        values["phases"] = [dict(kind="importance", batch_size=2, settings=dict(steps=2))]
    expected = train_layers(load_depth_recipe(values))
    broken = load_depth_recipe({**values, "output_dir": str(tmp_path / "broken")})
    original = depth.Progress.end_phase

    def end_phase(self, result):
        original(self, result)
        raise Stopped

    for _ in values["phases"]:
        with monkeypatch.context() as patch:
            patch.setattr(depth.Progress, "end_phase", end_phase)
            with pytest.raises(Stopped):
                train_layers(broken, resume=True)
    import moe_kit.training.depth_evaluation as evaluation

    measure, calls = evaluation._measure, []

    def once(*arguments):
        if calls:
            raise Stopped
        calls.append(1)
        return measure(*arguments)

    def second(*arguments):
        calls.append(1)
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_measure", once)
        with pytest.raises(Stopped):
            train_layers(broken, resume=True)
    monkeypatch.setattr(evaluation, "_measure", second)
    assert train_layers(broken, resume=True) == expected
    assert len(calls) == 2, "a batch was evaluated twice"
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_an_interruption_keeps_the_step_under_way(tmp_path):
    recipe = load_depth_recipe(tiny_values("first", tmp_path / "out", steps=6))

    def on_step(kind, index, loss):
        if (kind, index) == ("end_to_end", 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=f"moe-kit train {tmp_path / 'out'} --resume"):
        train_layers(recipe, on_step=on_step)
    assert len(json.loads((tmp_path / "out" / "progress" / "state.json").read_text())["history"]) == 3
    seen = []
    train_layers(recipe, resume=True, on_step=lambda *values: seen.append(values[:2]))
    assert seen[0] == ("end_to_end", 3)


def test_a_process_killed_at_any_moment_leaves_a_whole_state(tmp_path):
    """`kill -9` of the script in the middle of its steps; the resumed script ends like an uninterrupted one."""
    script = Path(__file__).parents[2] / "train" / "depth_train.py"
    for part in ("whole", "broken"):
        values = {**tiny_values("first", tmp_path / part, steps=40), "save_steps": 1}
        (tmp_path / f"{part}.yaml").write_text(yaml.safe_dump(values))

    def start(*words):
        # PEFT writes sets in the order of their hashes
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        return subprocess.Popen(
            [sys.executable, str(script), *words], env=environment, stdout=subprocess.PIPE, text=True
        )

    assert start(str(tmp_path / "whole.yaml")).wait(300) == 0
    process = start(str(tmp_path / "broken.yaml"))
    assert process.stdout.readline().startswith("end_to_end 0")
    assert process.stdout.readline().startswith("end_to_end 10")
    time.sleep(0.05)
    process.kill()
    process.wait(60)
    assert (tmp_path / "broken" / "progress" / "state.json").is_file()
    process = start(str(tmp_path / "broken"), "--resume")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "end_to_end 0:" not in out
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_what_cannot_be_resumed_is_refused(tmp_path):
    folder = tmp_path / "out"
    values = tiny_values("first", folder)
    with pytest.raises(Stopped):
        train_layers(load_depth_recipe(values), on_step=stop_at("lora", 1))
    with pytest.raises(ConfigError, match=r"\['seed'\] differ"):
        train_layers(load_depth_recipe({**values, "seed": 5}), resume=True)
    state = folder / "progress" / "state.json"
    stored = json.loads(state.read_text())
    tensors = folder / "progress" / stored["tensors"]
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train_layers(load_depth_recipe(values), resume=True)
    tensors.write_bytes(whole)
    state.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train_layers(load_depth_recipe(values), resume=True)
    # without --resume the run starts over and never looks at what was there
    seen = []
    train_layers(load_depth_recipe(values), on_step=lambda *step: seen.append(step[:2]))
    assert seen[0] == ("end_to_end", 0)
    with pytest.raises(ConfigError, match="expected 1 or more"):
        load_depth_recipe({**values, "save_steps": 0})
