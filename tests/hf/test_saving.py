"""Adapters reach the disk whole or not at all: a failing write, a failing rename and a kill leave the older ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from moe_kit import CheckpointError, RoutedAdapterConfig, load_adapters, save_adapters
from moe_kit.hf import adapter_files, saving
from tests.tiny import batch_of, tiny_llama, wake_banks


def model_of(seed=0):
    model = tiny_llama()
    torch.manual_seed(seed)
    config = RoutedAdapterConfig.from_preset("mixture_of_lora", num_experts=3, r=2, target_modules=["q_proj"])
    model.add_adapter(config, "routed")
    model.add_adapter(LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False), "plain")
    model.set_adapter(["routed", "plain"])
    wake_banks(model, std=0.3 + seed)
    return model.eval()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def logits(model):
    return model(**batch_of()).logits


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "adapters"
    save_adapters(model_of(), folder)
    (folder / "notes.txt").write_text("mine")
    return folder, contents(folder)


def failing(at, error=None):
    """A function that raises on call number `at`, else does what it did."""

    def wrap(function):
        calls = []

        def wrapped(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                raise error or OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return wrapped

    return wrap


def test_a_newer_version_takes_the_place_of_an_older_one(saved):
    folder, before = saved
    newer = model_of(seed=1)
    save_adapters(newer, folder)
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after["notes.txt"] == b"mine"
    assert after["routed/adapter_model.safetensors"] != before["routed/adapter_model.safetensors"]
    again = tiny_llama()
    load_adapters(again, folder)
    assert torch.equal(logits(again.eval()), logits(newer))


@pytest.mark.parametrize("at", [1, 2])
def test_a_failing_write_leaves_what_was_there(saved, monkeypatch, at):
    folder, before = saved
    monkeypatch.setattr(saving, "save_file", failing(at)(saving.save_file))
    with pytest.raises(CheckpointError, match=r"cannot save the adapters to .*No space left.*Make room"):
        save_adapters(model_of(seed=1), folder)
    assert contents(folder) == before


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(1, 7))
def test_a_failing_rename_puts_older_files_back(saved, monkeypatch, at, error):
    """Three renames take the older files away, three put the newer ones in place; any of them may fail."""
    folder, before = saved
    with monkeypatch.context() as patch:
        patch.setattr(adapter_files.os, "replace", failing(at, error)(os.replace))
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            save_adapters(model_of(seed=1), folder)
    assert contents(folder) == before


def test_a_failing_flush_is_an_error(saved, monkeypatch):
    folder, before = saved
    monkeypatch.setattr(adapter_files.os, "fsync", failing(3)(os.fsync))
    with pytest.raises(CheckpointError, match="No space left"):
        save_adapters(model_of(seed=1), folder)
    assert contents(folder) == before


def test_a_folder_that_was_not_there_is_not_there_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "save_file", failing(2)(saving.save_file))
    with pytest.raises(CheckpointError):
        save_adapters(model_of(), tmp_path / "deep" / "adapters")
    assert not list((tmp_path / "deep").iterdir())


def test_a_failure_leaves_the_models_configuration_alone(tmp_path, monkeypatch):
    model = model_of()
    before = {name: (c.inference_mode, c.base_model_name_or_path) for name, c in model.peft_config.items()}
    monkeypatch.setattr(saving, "save_file", failing(2)(saving.save_file))
    with pytest.raises(CheckpointError):
        save_adapters(model, tmp_path / "adapters")
    assert {name: (c.inference_mode, c.base_model_name_or_path) for name, c in model.peft_config.items()} == before


KILLED = """
import os, signal, sys
from moe_kit import save_adapters
from moe_kit.hf import adapter_files
from tests.hf.test_saving import model_of

replace, left = os.replace, [int(sys.argv[2])]

def killed(source, target):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    replace(source, target)

adapter_files.os.replace = killed
save_adapters(model_of(seed=1), sys.argv[1])
"""


@pytest.mark.parametrize("renames", [0, 4])
def test_a_kill_leaves_the_older_ones_or_an_error(saved, renames):
    """Before the first rename all is as it was; between renames nothing looks whole, and nothing is lost."""
    folder, before = saved
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(renames)], env=environment, capture_output=True, cwd=root
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    if renames == 0:
        assert {name: data for name, data in contents(folder).items() if not name.startswith(".")} == before
        load_adapters(tiny_llama(), folder)
        return
    with pytest.raises(CheckpointError, match=r"adapters\.json"):
        load_adapters(tiny_llama(), folder)
    (parked,) = folder.glob(".*.part/old")
    kept = {**contents(folder), **contents(parked)}
    assert {name: kept[name] for name in before} == before
    save_adapters(model_of(seed=1), folder)
    load_adapters(tiny_llama(), folder)


def test_saving_into_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapters(model_of(), ".")
    save_adapters(model_of(), ".")
    assert {path.name for path in tmp_path.iterdir()} == {"adapters.json", "routed", "plain"}
    assert Path.cwd() == tmp_path
