"""PEFT LoRA folders as experts: equal to the LoRAs, frozen or not, saved with the adapter."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moe_kit import RoutedAdapterConfig
from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.routing import force_experts
from tests.tiny import tiny_llama
from tests.tolerances import assert_close

IDS = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(3))
LORAS = {
    "plain": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 5, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 3,
        "target_modules": ["v_proj", "q_proj"],
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 9},
    },
    # PEFT reads the keys as regular expressions for the end of a path
    "expressions": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {r"layers\.1\..*": 3},
        "alpha_pattern": {r".*\.0\.self_attn\.q_proj": 40, "k_proj|v_proj": 20},
    },
}


@pytest.fixture
def folders(tmp_path):
    for index, (name, options) in enumerate(LORAS.items()):
        torch.manual_seed(index)
        model = get_peft_model(tiny_llama(), LoraConfig(init_lora_weights=False, **options))
        model.save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in LORAS]


def wrapped(folders, **more):
    config = RoutedAdapterConfig.from_preset("mixture_of_lora", top_k=2, from_adapters=folders, **more)
    return get_peft_model(tiny_llama(), config, adapter_name="library").eval()


def test_each_expert_is_its_lora(folders):
    model = wrapped(folders)
    for expert, folder in enumerate(folders):
        expected = PeftModel.from_pretrained(tiny_llama(), folder).eval()(input_ids=IDS).logits
        weights = torch.zeros(1, len(LORAS))
        weights[0, expert] = 1
        with force_experts(model, weights_BE=weights):
            assert_close(folder, model(input_ids=IDS).logits, expected)
    config = model.peft_config["library"]
    assert config.expert_names == list(LORAS)
    assert (config.num_experts, config.r) == (len(LORAS), 5)


def test_frozen_by_default_and_trainable_on_request(folders):
    frozen = [name for name, value in wrapped(folders).named_parameters() if value.requires_grad]
    assert frozen
    assert all("router" in name for name in frozen)
    model = wrapped(folders, bank_options={"frozen": False})
    assert any("bank" in name for name, value in model.named_parameters() if value.requires_grad)


def test_saving_needs_the_folders_no_more(folders, tmp_path):
    model = wrapped(folders)
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "out")
    for folder in folders:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / folder / file).unlink()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "library", adapter_name="library").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, expected)


def test_folders_that_cannot_be_used(folders, tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        wrapped([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="leave out"):
        wrapped(folders, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="set bank='lora'"):
        wrapped(folders, bank="shared_a")

    def broken(change):
        config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
        folder = tmp_path / "broken"
        folder.mkdir(exist_ok=True)
        tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
        change(config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return str(folder)

    for change, match in (
        (lambda c, t: c.update(peft_type="LOHA"), "LOHA"),
        (lambda c, t: c.update(use_dora=True), "use_dora"),
        (lambda c, t: t.pop(next(k for k in t if "lora_B" in k)), "no lora_B"),
        (lambda c, t: t.update(extra=torch.ones(1)), "no LoRA of a linear: extra"),
    ):
        with pytest.raises(CheckpointError, match=match):
            wrapped([broken(change)])
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        wrapped([str(tmp_path / "broken")])


def test_a_lora_of_another_base_is_refused(folders):
    config = RoutedAdapterConfig.from_preset("mixture_of_lora", top_k=2, from_adapters=folders)
    with pytest.raises(ConfigError, match="trained on another base"):
        get_peft_model(tiny_llama(width=32), config)
