"""Runs the layers below the first adapter once for several passes over the same batch.

Frozen layers below the first adapted one give the same output for every selection of experts. `shared_prefix` keeps
that output from the first pass and hands it to the following ones; embeddings still run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")


def first_adapted_layer(model: nn.Module) -> tuple[nn.ModuleList | None, int]:
    """The layer stack that holds adapters, and the index of the lowest layer with one.

    Args:
        model: a model with tuner layers.

    Returns:
        (stack, index); (None, 0) if adapters lie outside one stack of layers, or anything below the first of them
        is trained.
    """
    stacks: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            match = _LAYER.match(name)
            if match is None:
                return None, 0
            path, index = match.group(1), int(match.group(2))
            stacks[path] = min(index, stacks.get(path, index))
    if len(stacks) != 1:
        return None, 0
    (path, index), *_ = stacks.items()
    stack = model.get_submodule(path)
    if not isinstance(stack, nn.ModuleList):
        return None, 0
    below = [parameter for layer in stack[:index] for parameter in layer.parameters()]
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    below += list(embeddings.parameters()) if embeddings is not None else []
    return (None, 0) if any(parameter.requires_grad for parameter in below) else (stack, index)


@contextmanager
def shared_prefix(model: nn.Module) -> Iterator[bool]:
    """Inside this block the second and later passes skip the frozen layers below the first adapter.

    All passes must see the same batch. Nothing is skipped where the structure does not allow it.

    Args:
        model: a model with adapters.

    Yields:
        True if layers are shared.
    """
    stack, count = first_adapted_layer(model)
    if stack is None or count == 0:
        yield False
        return
    layers = list(stack[:count])
    kept: list[Any] = []

    def reuse(*args: Any, **kwargs: Any) -> Any:
        return kept[0]

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        kept.append(output.detach() if hasattr(output, "detach") else output)
        for layer in layers:
            layer.forward = reuse
        handle.remove()

    handle = layers[-1].register_forward_hook(keep)
    try:
        yield True
    finally:
        handle.remove()
        for layer in layers:
            layer.__dict__.pop("forward", None)
