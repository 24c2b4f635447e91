"""The canary of the PEFT registration, and what `import moe_kit` costs.

PEFT has no door for outside methods, so two members are added to its enum. Should PEFT change what that relies on,
these tests fail before a user sees a bare KeyError.
"""

import copy
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import moe_kit
from moe_kit.adapters.model import RoutedAdapterModel
from moe_kit.errors import ConfigError
from moe_kit.hf import registration


class TestCanary:
    def test_member_behaves_like_peft_s_own(self):
        member, own = PeftType.MOE_ADAPTER, PeftType.LORA
        assert type(member) is type(own) is PeftType
        assert isinstance(member, str)
        assert member == "MOE_ADAPTER" == member.value == member.name
        assert PeftType("MOE_ADAPTER") is PeftType["MOE_ADAPTER"] is member
        assert member in list(PeftType)
        assert "MOE_ADAPTER" in PeftType.__members__
        assert hash(member) == hash("MOE_ADAPTER")
        assert copy.deepcopy(member) is member
        assert pickle.loads(pickle.dumps(member)) is member
        assert len({member, own}) == 2

    def test_peft_s_tables(self):
        assert PEFT_TYPE_TO_CONFIG_MAPPING["MOE_ADAPTER"] is moe_kit.RoutedAdapterConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING["MOE_ADAPTER"] is RoutedAdapterModel
        # the naming law of native loading and deletion
        assert PEFT_TYPE_TO_PREFIX_MAPPING["MOE_ADAPTER"] == "moe_adapter_" == RoutedAdapterModel.prefix

    def test_no_other_method_owns_our_prefix(self):
        others = {str(kind): prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if "MOE_" not in str(kind)}
        assert not [kind for kind, prefix in others.items() if prefix.startswith("moe_") or "moe_".startswith(prefix)]

    def test_twice_changes_nothing(self):
        before = (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING))
        assert registration.add_peft_type("MOE_ADAPTER") is PeftType.MOE_ADAPTER
        registration.register("MOE_ADAPTER", moe_kit.RoutedAdapterConfig, RoutedAdapterModel)
        assert (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before

    def test_another_kind_of_enum_is_named(self, monkeypatch):
        from enum import Enum

        class Changed(Enum):
            LORA = 1

        monkeypatch.setattr(registration, "PeftType", Changed)
        with pytest.raises(ConfigError, match=r"no longer a string enum.*peft 0\.21"):
            registration.add_peft_type("MOE_ADAPTER")

    def test_what_we_override_still_exists(self):
        from peft.tuners.tuners_utils import BaseTuner

        for name in (
            "inject_adapter",
            "_create_and_replace",
            "_replace_module",
            "_remove_adapter_name_from_key",
            "_remap_adapter_state_dict_for_load",
        ):
            assert hasattr(BaseTuner, name), name

    def test_configuration_round_trip(self, tmp_path):
        config = moe_kit.RoutedAdapterConfig.from_preset("mixture_of_lora", target_modules={"v_proj", "q_proj"})
        config.save_pretrained(tmp_path)
        again = PeftConfig.from_pretrained(tmp_path)
        assert type(again) is moe_kit.RoutedAdapterConfig
        assert again.to_dict() == config.to_dict()
        assert again.target_modules == ["q_proj", "v_proj"]

    def test_a_field_of_a_newer_version_warns(self, tmp_path):
        import json

        config = moe_kit.RoutedAdapterConfig.from_preset("remix")
        config.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "a_field_of_2031": 1}))
        with pytest.warns(UserWarning, match="a_field_of_2031"):
            again = PeftConfig.from_pretrained(tmp_path)
        assert again.to_dict() == config.to_dict()


IMPORT = """
import sys, time
import peft, torch
from transformers import PreTrainedModel
began = time.process_time()
import moe_kit
print(time.process_time() - began)
print(*sorted(name for name in sys.modules if name.startswith("moe_kit_kernels") or name == "triton"))
"""


def test_import_is_cheap_and_loads_no_kernel():
    """The processor time that `import moe_kit` adds to `import peft`, least of three fresh processes."""
    seconds, modules = [], set()
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        first, _, second = done.stdout.strip().partition("\n")
        seconds.append(float(first))
        modules |= set(second.split())
    kernels = {name for name in modules if name.startswith("moe_kit_kernels.") and name.split(".")[1] not in ALLOWED}
    assert not kernels
    assert min(seconds) <= 0.3


# errors, and helpers without a kernel
ALLOWED = {"errors", "common"}
