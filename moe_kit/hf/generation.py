"""What a call of `generate` is about: one decision a request, made on its prompt.

A model is called once for each token, and no argument says which of its tokens are the prompt: without a cache every
call holds all tokens so far, and in assisted decoding the first call holds candidates behind the prompt. So `generate`
notes the width of its prompt, and keeps the decisions of the request where there is no cache for them to ride on.

Continuous batching joins the tokens of many requests in one row and moves them between calls. A decision about a
sequence is refused there, by the router that would make it for the whole row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moe_kit.errors import RoutingError
from moe_kit.routing.scope import JOINED
from moe_kit.routing.state import ATTRIBUTE

_GENERATE, _GENERATE_BATCH = "generate", "generate_batch"


@dataclass
class Generation:
    """One call of `generate`.

    Attributes:
        prompt_width: columns of the prompt, padding included; None = not known.
        carried: site name -> decisions of this request, where no cache holds them.
        notes: what others keep for the call, by their name.
    """

    prompt_width: int | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def note_generate(model: nn.Module, wrapper: Callable[..., Any] | None = None) -> None:
    """Let `model.generate` note what it is called with; doing it twice changes nothing.

    Args:
        model: the inner model.
        wrapper: called in place of `generate` with the model and its arguments; it calls `generate_noted`.
    """
    if hasattr(type(model), _GENERATE) and (wrapper is not None or _GENERATE not in model.__dict__):
        model.__dict__[_GENERATE] = functools.partial(wrapper or generate_noted, model)
        if hasattr(type(model), _GENERATE_BATCH):
            model.__dict__[_GENERATE_BATCH] = functools.partial(_generate_batch, model)


def stop_noting(model: nn.Module) -> None:
    """Undo `note_generate`."""
    model.__dict__.pop(_GENERATE, None)
    model.__dict__.pop(_GENERATE_BATCH, None)


def generate_noted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a model with routers.

    Args:
        model: the inner model.
        *args: as for `generate`.
        **kwargs: as for `generate`.
    """
    state = model.__dict__[ATTRIBUTE]
    previous, state.generation = state.generation, Generation(prompt_width(model, args, kwargs))
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        state.generation = previous


def prompt_width(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int | None:
    """Columns of the prompt that `generate` is called with, padding included.

    Args:
        model: the inner model.
        args: positional arguments of `generate`.
        kwargs: its named arguments.

    Returns:
        None where it is not known: nothing was given, or a decoder that starts by itself.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        # what is given is for the encoder; a decoder starts with its own prompt, or with one token
        prompt = kwargs.get("decoder_input_ids")
        return None if prompt is None else prompt.shape[1]
    names = ("inputs", "input_ids", "inputs_embeds")
    prompt = next((kwargs[name] for name in names if kwargs.get(name) is not None), args[0] if args else None)
    return prompt.shape[1] if isinstance(prompt, Tensor) else None


def joins_requests(arguments: dict[str, Any]) -> bool:
    """Whether a pass is one of continuous batching, over the joined tokens of many requests.

    Args:
        arguments: arguments of the model by name.
    """
    return "Paged" in type(arguments.get("cache")).__name__


def _generate_batch(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`generate_batch`, which keeps to itself why a request failed: a refusal by a router is raised.

    Raises:
        RoutingError: if a router cannot decide for requests that are joined.
    """
    results = type(model).generate_batch(model, *args, **kwargs)
    for result in results.values():
        if JOINED in str(getattr(result, "error", "")):
            raise RoutingError(result.error)
    return results
