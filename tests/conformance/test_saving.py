"""Saving and loading: PEFT's scenarios for folders, adapter names, safetensors, low memory, and files that do not fit."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_kit import CheckpointError, RoutedAdapterConfig
from tests.conformance.common import NAME, adapter_state, config, routed, wake
from tests.tiny import batch_of, tiny_llama


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path):
    model = routed()
    model.save_pretrained(tmp_path)
    return model, tmp_path / NAME


def logits(model):
    return model(**batch_of()).logits


def test_folder_holds_what_peft_writes(saved):
    model, folder = saved
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    stored = load_file(folder / "adapter_model.safetensors")
    assert not [key for key in stored if NAME in key], "an adapter's name must not be part of its keys"
    assert set(stored) == set(get_peft_model_state_dict(model, adapter_name=NAME))
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["peft_type"] == "MOE_ADAPTER"
    assert values["inference_mode"] is True


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", [NAME, "another", "default", "moe"])
def test_round_trip_under_any_name(saved, name, low_cpu_mem_usage):
    model, folder = saved
    loaded = PeftModel.from_pretrained(
        tiny_llama().eval(), folder, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert not [key for key, value in loaded.named_parameters() if value.is_meta]
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert not [key for key, value in loaded.named_parameters() if value.requires_grad]


def test_trainable_after_loading(saved):
    _, folder = saved
    loaded = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
    trained = {key for key, value in loaded.named_parameters() if value.requires_grad}
    assert trained
    assert all("moe_adapter_" in key for key in trained)


def test_from_pretrained_accepts_a_configuration(saved):
    model, folder = saved
    given = PeftConfig.from_pretrained(folder)
    assert isinstance(given, RoutedAdapterConfig)
    loaded = PeftModel.from_pretrained(tiny_llama().eval(), folder, config=given)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert loaded.peft_config["default"] is given


def test_adapter_name_that_is_part_of_another_name(tmp_path):
    model = routed(name="moe_adapter")
    model.save_pretrained(tmp_path)
    (folder,) = [path.parent for path in tmp_path.rglob("adapter_model.safetensors")]
    loaded = PeftModel.from_pretrained(tiny_llama().eval(), folder, adapter_name="bank")
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_selected_adapters(tmp_path):
    model = routed()
    model.add_adapter("second", config(r=2))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / NAME).exists()
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["unknown"])


def test_load_multiple_adapters(saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(tiny_llama().eval(), folder, adapter_name="one")
    result = loaded.load_adapter(folder, adapter_name="two")
    assert not [key for key in result.missing_keys if "moe_adapter" in key]
    assert not result.unexpected_keys
    expected = logits(model)
    for name in ("one", "two"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval()), expected), name


def test_state_survives_a_change_of_the_model_after_saving(saved):
    model, folder = saved
    expected = logits(model)
    wake(model, seed=5)
    assert not torch.equal(logits(model), expected)
    loaded = PeftModel.from_pretrained(tiny_llama().eval(), folder)
    assert torch.equal(logits(loaded.eval()), expected)


def test_trained_adapter_saves_as_safetensors(tmp_path):
    model = routed().train()
    model(**batch_of()).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / NAME, adapter_name=NAME)
    for key, value in adapter_state(model).items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_config_and_model_can_be_copied(copied):
    one = config()
    assert copied(one) == one
    model = routed()
    expected = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), expected)
    wake(twin, seed=5)
    assert not torch.equal(logits(twin), expected), "a copy must own its weights"
    assert torch.equal(logits(model), expected)
    # each has hooks and a state of its own
    twin.train()(**batch_of()).loss.backward()
    assert not [key for key, value in model.named_parameters() if value.grad is not None]


def test_auto_classes(tmp_path, base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    wrapped = get_peft_model(base, config(), adapter_name=NAME)
    wake(wrapped)
    wrapped.save_pretrained(tmp_path)
    named = tmp_path / NAME
    expected = logits(wrapped.eval())
    loaded = AutoPeftModelForCausalLM.from_pretrained(named)
    assert torch.equal(logits(loaded.eval()), expected)
    native = AutoModelForCausalLM.from_pretrained(named)
    assert torch.equal(logits(native.eval()), expected)


class TestFilesThatDoNotFit:
    def test_truncated(self, saved):
        _, folder = saved
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="cut off"):
            PeftModel.from_pretrained(tiny_llama(), folder)

    def test_a_pickle_is_refused(self, saved):
        _, folder = saved
        (folder / "adapter_model.safetensors").unlink()
        marker = folder / "executed"

        class Payload:
            def __reduce__(self):
                return (open, (str(marker), "w"))

        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
        with pytest.raises(CheckpointError, match="pickle"):
            PeftModel.from_pretrained(tiny_llama(), folder)
        assert not marker.exists()

    def test_weights_of_another_method(self, saved):
        _, folder = saved
        save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="another PEFT method"):
            PeftModel.from_pretrained(tiny_llama(), folder)

    def test_another_base(self, saved):
        _, folder = saved
        with pytest.raises(CheckpointError, match=r"of other sizes .*another base model"):
            PeftModel.from_pretrained(tiny_llama(width=32), folder)
        with pytest.raises(CheckpointError, match="lacks"):
            PeftModel.from_pretrained(tiny_llama(layers=3), folder)
        with pytest.raises(CheckpointError, match="the model has not"):
            PeftModel.from_pretrained(tiny_llama(layers=1), folder)

    def test_a_weight_is_missing(self, saved):
        _, folder = saved
        path = folder / "adapter_model.safetensors"
        stored = load_file(path)
        del stored[sorted(stored)[0]]
        save_file(stored, path)
        with pytest.raises(CheckpointError, match="lacks 1 of"):
            PeftModel.from_pretrained(tiny_llama(), folder)

    def test_native_loading_notices_a_missing_weight(self, saved):
        _, folder = saved
        other = shutil.copytree(folder, folder.parent / "other")
        path = other / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|not fully covered|header"):
            tiny_llama().load_adapter(str(other))
