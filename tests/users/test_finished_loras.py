"""Finished LoRAs as experts: those whose start changed the base's weights are no sum on the base itself."""

import pytest
import torch
from peft import KasaConfig, LoraConfig, get_peft_model

from moe_kit import CheckpointError, RoutedAdapterConfig
from tests.tiny import batch_of, tiny_llama
from tests.tolerances import assert_close


def trained(folder, **options):
    """A LoRA that was trained a little, and the folder of its start."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama().eval(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))
    # PEFT's own names the start again before it is saved for a conversion
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "start")
    model.peft_config["default"].init_lora_weights = options.get("init_lora_weights", True)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    model(**batch_of()).loss.backward()
    optimizer.step()
    return model.eval()


def as_expert(folder):
    config = RoutedAdapterConfig.from_preset("mixture_of_lora", top_k=1, losses={}, from_adapters=[str(folder)])
    return get_peft_model(tiny_llama().eval(), config).eval()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changed_the_base(start, tmp_path):
    model = trained(tmp_path, init_lora_weights=start)
    with torch.no_grad():
        expected = model(**batch_of()).logits
    model.save_pretrained(tmp_path / "as_it_is")
    with pytest.raises(CheckpointError, match=rf"init_lora_weights='{start}', which changed the base's weights"):
        as_expert(tmp_path / "as_it_is")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with torch.no_grad():
        assert_close("logits", as_expert(tmp_path / "plain")(**batch_of()).logits, expected)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", True])
def test_a_start_that_left_it_alone(start, tmp_path):
    model = trained(tmp_path, init_lora_weights=start)
    with torch.no_grad():
        expected = model(**batch_of()).logits
    model.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        assert_close("logits", as_expert(tmp_path / "lora")(**batch_of()).logits, expected)


def test_kasa_is_named(tmp_path):
    model = trained(tmp_path, kasa_config=KasaConfig())
    model.save_pretrained(tmp_path / "kasa")
    with pytest.raises(CheckpointError, match="uses kasa_config"):
        as_expert(tmp_path / "kasa")
