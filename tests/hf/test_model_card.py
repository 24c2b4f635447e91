"""The card beside a saved adapter says how to load it, once, and no other file is touched."""

import pytest
from peft import get_peft_model

from moe_kit import LayerRoutingConfig, RoutedAdapterConfig
from tests.tiny import tiny_llama

CONFIGS = [
    lambda: RoutedAdapterConfig.from_preset("remix", num_experts=2, top_k=1, r=2, target_modules=["q_proj"]),
    lambda: LayerRoutingConfig.from_preset("dr_llm"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["adapters", "layers"])
@pytest.mark.parametrize("name", ["default", "other"])
def test_card_says_import_first(tmp_path, config, name):
    model = get_peft_model(tiny_llama(), config(), adapter_name=name)
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert text.count("import moe_kit") == 1
    assert text.index("import moe_kit") < text.index("PeftModel.from_pretrained")


def test_another_readme_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# A project\n")
    CONFIGS[0]().save_pretrained(str(tmp_path / "adapter"))
    assert (tmp_path / "README.md").read_text() == "# A project\n"
    assert not (tmp_path / "adapter" / "README.md").exists()
