"""Hooks that open and close a pass for layer routers, and `generate` with one decision a call.

They stand beside the hooks of `moe_kit.hf.hooks`, which open the routing context first. A part that may be called alone
(the backbone without its head) has its own pair, which works only when no pass of the whole model is under way.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import nn

from moe_kit.depth.state import ATTRIBUTE, DepthState
from moe_kit.hf.generation import generate_noted, note_generate, prompt_width, stop_noting
from moe_kit.hf.hooks import attach, named_arguments
from moe_kit.hf.passes import parts_of
from moe_kit.routing.state import ATTRIBUTE as ROUTING

_HOOKS = "moe_depth_hooks"


def attach_depth(model: nn.Module, num_layers: int, anchors: tuple[int, ...]) -> DepthState:
    """Attach depth state and hooks to an inner Hugging Face model; doing it twice changes nothing.

    Args:
        model: the model that receives `input_ids`, `attention_mask` and `labels`.
        num_layers: its decoder layers.
        anchors: layers that size the masks.

    Returns:
        The state that all its layer routers share.
    """
    routing = attach(model)
    state = model.__dict__.get(ATTRIBUTE)
    if state is None:
        state = model.__dict__[ATTRIBUTE] = DepthState(routing, num_layers, anchors)
    if _HOOKS not in model.__dict__:
        handles = []
        for module in (model, *parts_of(model).values()):
            module.__dict__[ATTRIBUTE] = state
            handles += [
                module.register_forward_pre_hook(_open if module is model else _open_part, with_kwargs=True),
                # what is recorded, and the losses, must be there before the routing hooks close the context
                module.register_forward_hook(_before_close, always_call=True, prepend=True),
                module.register_forward_hook(_close, always_call=True),
            ]
        model.__dict__[_HOOKS] = tuple(handles)
        note_generate(model, _generate)
    return state


def detach_depth(model: nn.Module) -> None:
    """Remove what `attach_depth` added; doing it twice changes nothing."""
    for handle in model.__dict__.pop(_HOOKS, ()):
        handle.remove()
    for module in (model, *parts_of(model).values()):
        module.__dict__.pop(ATTRIBUTE, None)
    stop_noting(model)
    state = model.__dict__.get(ROUTING)
    if state is not None and state.carries:
        note_generate(model)


def _open(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    state: DepthState = module.__dict__[ATTRIBUTE]
    state.open(module, named_arguments(module, args, kwargs))


def _open_part(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    state: DepthState = module.__dict__[ATTRIBUTE]
    # the routing hooks have found out already whether the part was called alone
    if state.routing.part is module:
        state.open(module, named_arguments(module, args, kwargs))


def _before_close(module: nn.Module, args: tuple, output: Any) -> None:
    state: DepthState = module.__dict__[ATTRIBUTE]
    if state.present.under_way is module and output is not None:
        state.before_close()


def _close(module: nn.Module, args: tuple, output: Any) -> None:
    state: DepthState = module.__dict__[ATTRIBUTE]
    if state.present.under_way is module:
        state.close()


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`generate` with one decision for the whole call, also without a cache."""
    state: DepthState = model.__dict__[ATTRIBUTE]
    generation_config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    chunk = kwargs.get("prefill_chunk_size", getattr(generation_config, "prefill_chunk_size", None))
    # a compiled decoding step cannot branch on a route
    if kwargs.get("generation_config") is not None:
        kwargs["generation_config"] = copy.copy(kwargs["generation_config"])
        kwargs["generation_config"].disable_compile = True
    else:
        kwargs.setdefault("disable_compile", True)
    width = prompt_width(model, args, kwargs)
    if chunk is not None and (width is None or width > chunk) and state.reads_prompt():
        _warn_chunks(state, chunk)
    return generate_noted(model, *args, **kwargs)


def _warn_chunks(state: DepthState, chunk: int) -> None:
    """Say once a model that decisions see less than the prompt."""
    if not state.warned_chunks:
        state.warned_chunks = True
        warnings.warn(
            f"moe_kit: with prefill_chunk_size={chunk} a sequence's layer routes are decided on its first chunk.",
            stacklevel=4,
        )
