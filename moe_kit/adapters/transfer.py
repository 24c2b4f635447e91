"""Experts of one adapter as the start of another on the same model (MHR-z: old skills, a fresh table of tasks)."""

from __future__ import annotations

import torch
from torch import nn

from moe_kit.adapters.base_experts import AdaptedExperts
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.errors import RoutingError


def copy_experts(model: nn.Module, source: str, target: str) -> None:
    """Copy the experts of an adapter into another; routers stay as they are.

    Args:
        model: a model with both adapters.
        source: name of the adapter to read.
        target: name of the adapter to fill; its banks have the same kind and sizes.

    Raises:
        RoutingError: if an adapter is missing, covers other linears, or the sizes differ; nothing is copied then.

    Example:
        `model.add_adapter("new_task", RoutedAdapterConfig.from_preset("mhr_z", ...))`, then
        `copy_experts(model, "skills", "new_task")` and train: only the new table moves.
    """
    pairs = []
    for path, layer in model.named_modules():
        if not isinstance(layer, (RoutedLayer, AdaptedExperts)):
            continue
        banks = layer.moe_adapter_bank
        if (source in banks) != (target in banks):
            missing = target if source in banks else source
            raise RoutingError(f"{path} has no adapter {missing!r}: give {source!r} and {target!r} the same targets.")
        if source not in banks:
            continue
        one, two = banks[source].state_dict(), banks[target].state_dict()
        shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (one, two)]
        if shapes[0] != shapes[1]:
            raise RoutingError(
                f"the experts at {path} have shapes {shapes[0]} in {source!r} and {shapes[1]} in {target!r}: use the "
                "same bank, rank, heads and number of experts."
            )
        pairs += [(one[name], two[name]) for name in one]
    if not pairs:
        raise RoutingError(f"the model has no routed adapters {source!r} and {target!r}.")
    with torch.no_grad():
        for value, filled in pairs:
            filled.copy_(value)
