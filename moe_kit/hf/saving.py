"""Saves and loads several adapters of one model - routed adapters, layer routers, LoRA - each as a valid PEFT folder.

PEFT's own `PeftModel.save_pretrained` cannot hold adapters of different types, and native `save_pretrained` writes one.
The folder gets one sub-folder an adapter, readable by PEFT alone, and an index with the order of injection, which
matters where one adapter wraps another's layer.
"""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.hf.adapter_files import replacing

INDEX = "adapters.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapters(model: nn.Module, folder: str | Path) -> tuple[str, ...]:
    """Save every adapter of a model, all of them or none (see `adapter_files.replacing`).

    Args:
        model: a `PeftModel`, or a transformers model with adapters of native `add_adapter`.
        folder: made if it does not exist.

    Returns:
        Names of the adapters, in the order of injection.

    Raises:
        ConfigError: if the model has no adapters.
        CheckpointError: if something cannot be written; what the folder held before is as it was.
    """
    configs: dict[str, PeftConfig] = dict(getattr(model, "peft_config", None) or {})
    if not configs:
        raise ConfigError(
            f"{type(model).__name__} has no adapters to save: add one with add_adapter or get_peft_model."
        )
    index = json.dumps({"adapters": list(configs), "active": _active(model)}, indent=2) + "\n"
    try:
        with replacing(folder, last=INDEX) as new:
            for name, config in configs.items():
                _save_one(model, name, config, new / name)
            (new / INDEX).write_text(index)
    except (OSError, RuntimeError, SafetensorError) as error:
        # a full disk shows as any of the three, by who writes
        raise CheckpointError(
            f"cannot save the adapters to {folder}: {error}. Make room, or choose another folder; what was there before is "
            "as it was."
        ) from error
    return tuple(configs)


def _save_one(model: nn.Module, name: str, config: PeftConfig, target: Path) -> None:
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if not isinstance(model, PeftModel):
        state = {_PREFIX + key: value for key, value in state.items()}
    target.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, target / _WEIGHTS, {"format": "pt"})
    # the model's own configuration stays as it is, also when writing fails
    config = copy(config)
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None)
    config.save_pretrained(str(target))


def load_adapters(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> tuple[str, ...]:
    """Load what `save_adapters` saved into a base model, natively and in the order of injection.

    Args:
        model: a transformers model without adapters of these names.
        folder: the folder.
        trainable: give the active adapters gradients.

    Returns:
        Names of the adapters that are active now, as when they were saved.

    Raises:
        CheckpointError: if the folder or a part of it is missing, truncated, or does not fit the model.
        ConfigError: if the model is a `PeftModel`, which holds one kind of adapter only.
    """
    if isinstance(model, PeftModel):
        raise ConfigError(
            "load_adapters needs the plain transformers model: a PeftModel holds one kind of adapter only."
        )
    folder = Path(folder)
    index = _read_index(folder)
    for name in index["adapters"]:
        _load_one(model, folder / name, name)
    active = index["active"] or index["adapters"]
    model.set_adapter(active if len(active) > 1 else active[0])
    wanted = set(active) if trainable else set()
    for key, parameter in model.named_parameters():
        owners = [name for name in index["adapters"] if f".{name}." in key or key.endswith(f".{name}")]
        if owners and not wanted.intersection(owners):
            parameter.requires_grad_(False)
    return tuple(active)


def _active(model: nn.Module) -> list[str]:
    active: Any = getattr(model, "active_adapters", None)
    try:
        active = active() if callable(active) else active
    except ValueError:
        active = []
    return [active] if isinstance(active, str) else list(active or [])


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        names, active = index["adapters"], index["active"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read {path} ({error}): expected a folder that save_adapters wrote. A folder with a single adapter "
            "is loaded with model.load_adapter or PeftModel.from_pretrained."
        ) from error
    return {"adapters": list(names), "active": list(active)}


def _load_one(model: nn.Module, folder: Path, name: str) -> None:
    try:
        config = PeftConfig.from_pretrained(str(folder))
        state = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read adapter {name!r} in {folder}: {error}") from error
    config.inference_mode = False
    if name in (getattr(model, "peft_config", None) or {}):
        raise CheckpointError(
            f"the model already has an adapter {name!r}: delete it first, or load into a fresh model."
        )
    model.add_adapter(config, name)
    state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    try:
        result = set_peft_model_state_dict(model, state, adapter_name=name)
    except RuntimeError as error:
        raise CheckpointError(f"adapter {name!r} in {folder} does not fit this model: {error}") from error
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    missing, unexpected = sorted(set(own) - set(state)), sorted(result.unexpected_keys)
    if missing or unexpected:
        raise CheckpointError(
            f"adapter {name!r} in {folder} does not fit this model: missing {missing[:3]}, unexpected {unexpected[:3]}."
        )
