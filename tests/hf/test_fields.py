"""Unknown fields: refused with the nearest known one where a user types them, passed over where a file brings them."""

import inspect
import json

import pytest
from peft import PeftConfig

from moe_kit import ConfigError, LayerRoutingConfig, RoutedAdapterConfig

KINDS = pytest.mark.parametrize(
    ("kind", "preset", "near", "known"),
    [
        (RoutedAdapterConfig, "mixture_of_lora", "num_expert", "num_experts"),
        (LayerRoutingConfig, "dr_llm", "router_hiden", "router_hidden"),
    ],
)


@KINDS
def test_the_nearest_field_is_named(kind, preset, near, known):
    with pytest.raises(ConfigError, match=f"Did you mean '{known}'"):
        kind(**{near: 3})
    with pytest.raises(ConfigError, match=f"Known: .*{known}"):
        kind(zzz=3)
    assert known in inspect.signature(kind).parameters


@KINDS
def test_a_file_of_a_later_version_loads_with_a_warning(kind, preset, near, known, tmp_path):
    """As PEFT's own configurations do."""
    config = kind.from_preset(preset)
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_a_later_version": 1}))
    for reader in (kind, PeftConfig):
        with pytest.warns(UserWarning, match="of_a_later_version"):
            assert reader.from_pretrained(tmp_path) == config
