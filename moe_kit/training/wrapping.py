"""Wrap a base model with what the adapter section of a recipe names: a routed preset, or plain PEFT LoRA.

Both go through `peft.get_peft_model`, so everything after it (training, saving, loading) is the same code.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moe_kit.errors import ConfigError
from moe_kit.training.recipe import AdapterConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

__all__ = ["LORA", "adapter_config", "linear_names", "matched", "trainable_parameters", "wrap_model"]

# the one name that is not a routed preset
LORA = "lora"


def adapter_config(model: PreTrainedModel, config: AdapterConfig) -> PeftConfig:
    """Build the PEFT config that an adapter section describes.

    Args:
        model: The base model; its layers are counted and its linears are listed.
        config: The adapter section. `settings` without `target_modules` adapts all linears of the decoder layers, or
            none where `target_parameters` asks for the experts of the base.

    Returns:
        A `peft.LoraConfig` for `lora`, else a `moe_kit.RoutedAdapterConfig`.

    Raises:
        ConfigError: Unknown preset or setting, a value that the config refuses, more upper layers than there are.
    """
    settings = dict(config.settings)
    layers = model.config.get_text_config().num_hidden_layers
    targets = settings.get("target_modules", None if settings.get("target_parameters") else "all-linear")
    if config.upper_layers is not None:
        if config.upper_layers > layers:
            raise ConfigError(f"adapter.upper_layers: got {config.upper_layers}, the model has {layers} layers")
        if settings.get("layers_to_transform") is not None:
            raise ConfigError("adapter: give upper_layers or settings.layers_to_transform, not both")
        settings["layers_to_transform"] = list(range(layers - config.upper_layers, layers))
        # peft takes layer indices only together with a list of names; ours finds all linears of the layers, which
        # leaves out the router of a mixture-of-experts base
        if targets == "all-linear" and config.preset == LORA:
            targets = linear_names(model)
    settings["target_modules"] = targets
    settings.setdefault("task_type", "CAUSAL_LM")
    if config.preset == LORA:
        from peft import LoraConfig

        _check_keys(settings, (f.name for f in dataclasses.fields(LoraConfig)))
        make: Any = LoraConfig
    else:
        from functools import partial

        from moe_kit import RoutedAdapterConfig

        presets = RoutedAdapterConfig.presets()
        if config.preset not in presets:
            near = difflib.get_close_matches(config.preset, [LORA, *presets], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join([LORA, *presets])}"
            raise ConfigError(f"adapter.preset: there is no preset {config.preset!r}; {hint}")
        _check_keys(settings, (f.name for f in dataclasses.fields(RoutedAdapterConfig)))
        make = partial(RoutedAdapterConfig.from_preset, config.preset)
    try:
        return make(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"adapter.settings: {error}") from error


def wrap_model(model: PreTrainedModel, config: AdapterConfig, *, seed: int = 0) -> PeftModel:
    """Add a fresh adapter to a base model and freeze the base.

    Args:
        model: The base model; it is modified in place, as PEFT does.
        config: The adapter section.
        seed: Seed of the adapter's initial weights.

    Returns:
        The PEFT model.

    Raises:
        ConfigError: See `adapter_config`; also when no module matches.
    """
    import torch
    from peft import get_peft_model

    wrapped = adapter_config(model, config)
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, wrapped)
    except ValueError as error:
        raise ConfigError(f"adapter: {error}") from error


def linear_names(model: PreTrainedModel) -> list[str]:
    """List the last name parts of all linears except the output head.

    Args:
        model: A Hugging Face model.

    Returns:
        Sorted names, `["down_proj", "gate_proj", ...]` for a Llama.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
        }
    )


def matched(model: Any) -> str:
    """Say what an adapter sits on, by name.

    Args:
        model: A PEFT model with one adapter, routed or LoRA.

    Returns:
        Text such as "q_proj (30), down_proj (30)": linears, and stacked weights of a base's experts, in the model's order.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from moe_kit.adapters.base_experts import AdaptedExperts
    from moe_kit.adapters.targets import describe

    paths = []
    for path, module in model.named_modules():
        if isinstance(module, AdaptedExperts):
            paths += [f"{path}.{name}" for stacks in module.moe_adapter_bank.values() for name in stacks]
        elif isinstance(module, BaseTunerLayer):
            paths.append(path)
    return describe(paths)


def trainable_parameters(model: Any) -> tuple[int, int]:
    """Count parameters.

    Args:
        model: Any torch module.

    Returns:
        Trainable parameters and all parameters.
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)


def _check_keys(settings: dict[str, Any], known: Iterable[str]) -> None:
    """Raise for a setting that the config class lacks."""
    names = [name for name in known if not name.startswith("_")]
    for key in settings:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ConfigError(f"unknown key 'adapter.settings.{key}': {hint}")
