"""Registers moe_kit's two PEFT types, `MOE_ADAPTER` and `MOE_DEPTH`.

PEFT accepts a method only if its name is a member of the `PeftType` enum, and has no entry point for outside methods.
So a member is added to the enum once; everything else in PEFT and transformers (saving, loading, native
`add_adapter`, `AutoPeft*`) then works unchanged. A canary test fails loudly should PEFT change this.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method

from moe_kit.errors import CheckpointError, ConfigError


def add_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enum of methods, or return the one that is there.

    Args:
        name: upper-case name of the member.

    Returns:
        The member; it equals its own name, like PEFT's.

    Raises:
        ConfigError: if PEFT's enum is no longer a plain string enum.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    if not issubclass(PeftType, str):
        raise ConfigError(f"peft's PeftType is no longer a string enum; moe_kit cannot register {name}: use peft 0.21.")
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    # attribute access on the class goes through the metaclass' descriptors, so set it on the class as well
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config_cls: type, model_cls: type[Any]) -> None:
    """Register a PEFT method; doing it twice changes nothing.

    Args:
        name: upper-case name of the PEFT type; its lower-case form with "_" is the prefix of all parameter containers.
        config_cls: the method's `PeftConfig`.
        model_cls: the method's tuner.
    """
    member = add_peft_type(name)
    _refuse_pickles()
    if member in PEFT_TYPE_TO_TUNER_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
        PEFT_TYPE_TO_PREFIX_MAPPING[member] = name.lower() + "_"
        return
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)


def _refuse_pickles() -> None:
    """Let `PeftModel.save_pretrained` refuse to write one of our adapters as a pickle, which nobody would read again.

    PEFT asks the method only when its model card and folders are written already.
    """
    original = PeftModel.save_pretrained
    if hasattr(original, "moe_kit_original"):
        return

    @functools.wraps(original)
    def save_pretrained(
        self: PeftModel,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if not safe_serialization:
            for name in self.peft_config if selected_adapters is None else selected_adapters:
                kind = str(getattr(getattr(self.peft_config.get(name), "peft_type", None), "value", ""))
                if kind.startswith("MOE_"):
                    raise CheckpointError(
                        f"adapter {name!r} ({kind}) is saved as safetensors only, got safe_serialization=False: a pickle "
                        "can run any code when it is read, and moe_kit reads none. Leave safe_serialization out; nothing "
                        "was written."
                    )
        original(self, save_directory, safe_serialization, selected_adapters, *args, **kwargs)

    save_pretrained.moe_kit_original = original  # type: ignore[attr-defined]
    PeftModel.save_pretrained = save_pretrained
