"""Model hooks: they open a routing context when a forward pass starts and close it when it ends.

One pair of hooks on the inner Hugging Face model serves PeftModel, native `add_adapter`, `generate`, Trainer, TRL
and gradient checkpointing alike, since every path calls the inner model with its keyword arguments. The closing hook
adds the auxiliary losses to the model's loss, multiplied by (local label tokens) / `num_items_in_batch`, so that the
gradient does not depend on how a batch is split over accumulation steps and processes.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.errors import ConfigError
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.state import ATTRIBUTE, ModelRouting

_HOOKS = "moe_routing_hooks"
_IGNORED_LABEL = -100


def attach(model: nn.Module) -> ModelRouting:
    """Attach routing state and hooks to an inner Hugging Face model; doing it twice changes nothing.

    Args:
        model: the model whose forward receives `input_ids`, `attention_mask` and `labels`.

    Returns:
        The state that all routers of this model share.
    """
    state = model.__dict__.get(ATTRIBUTE)
    if state is None:
        state = ModelRouting()
        model.__dict__[ATTRIBUTE] = state
    if _HOOKS not in model.__dict__:
        model.__dict__[_HOOKS] = (
            model.register_forward_pre_hook(_open, with_kwargs=True),
            model.register_forward_hook(_close, with_kwargs=True, always_call=True),
        )
    return state


def detach(model: nn.Module) -> None:
    """Remove the hooks and the state; doing it twice changes nothing."""
    for handle in model.__dict__.pop(_HOOKS, ()):
        handle.remove()
    model.__dict__.pop(ATTRIBUTE, None)


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args)), **kwargs}


def _open(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    state: ModelRouting = module.__dict__[ATTRIBUTE]
    state.open(build_context(_arguments(module, args, kwargs), state.inputs))


def build_context(arguments: dict[str, Any], inputs: dict[str, Any]) -> RoutingContext:
    """Make the context of a forward pass.

    Args:
        arguments: the inner model's arguments by name.
        inputs: what `routing_inputs` added.

    Returns:
        A fresh, open context.
    """
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    shape = None if tokens is None else tokens.shape[:2]
    mask_BS = _mask(arguments.get("attention_mask"), shape)
    return RoutingContext(
        mask_BS=mask_BS,
        prompt_mask_BS=_prompt_mask(arguments, inputs, mask_BS, shape),
        task_ids_B=inputs.get("task_ids"),
        prior_BE=inputs.get("prior"),
        scalars=inputs.get("scalars", {}),
    )


def _mask(attention_mask: Tensor | None, shape: torch.Size | None) -> Tensor | None:
    """Real tokens of this pass: the last columns of a two-dimensional mask."""
    if attention_mask is None or shape is None or attention_mask.dim() != 2:
        return None
    length = shape[1]
    if attention_mask.shape[1] < length:
        return None
    return attention_mask[:, attention_mask.shape[1] - length :].bool()


def _prompt_mask(
    arguments: dict[str, Any], inputs: dict[str, Any], mask_BS: Tensor | None, shape: torch.Size | None
) -> Tensor | None:
    """Tokens that a sequence-scope decision may read: given ones, else those before the first label, else all real."""
    if shape is None:
        return None
    given = inputs.get("prompt_mask")
    if given is not None and tuple(given.shape) == tuple(shape):
        prompt = given.bool()
        return prompt if mask_BS is None else prompt & mask_BS
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    columns_S = torch.arange(shape[1], device=device)
    length = inputs.get("prompt_length")
    labels = arguments.get("labels")
    if length is not None:
        length_B1 = torch.as_tensor(length, device=device).reshape(-1, 1)
        # a prompt is counted in real tokens, so left padding shifts it
        position_BS = columns_S[None] if mask_BS is None else mask_BS.long().cumsum(1) - 1
        prompt = (position_BS < length_B1).expand(shape)
    elif isinstance(labels, Tensor) and labels.dim() == 2 and tuple(labels.shape) == tuple(shape):
        prompt = (labels != _IGNORED_LABEL).long().cumsum(1) == 0
    else:
        return None
    prompt = prompt if mask_BS is None else prompt & mask_BS
    # a row whose labels start at its first token has no prompt of its own: it reads all its real tokens
    empty_B1 = ~prompt.any(1, keepdim=True)
    real = torch.ones_like(prompt) if mask_BS is None else mask_BS
    return torch.where(empty_B1, real, prompt)


def _close(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    state: ModelRouting = module.__dict__[ATTRIBUTE]
    state.close()
    if output is None or not (module.training and torch.is_grad_enabled()):
        return None
    loss = getattr(output, "loss", None)
    if loss is not None:
        _check_policy(state)
    auxiliary = state.total_loss()
    if auxiliary is None:
        return None
    arguments = _arguments(module, args, kwargs)
    if loss is None:
        _warn_no_loss(state)
        return None
    output.loss = loss + loss_share(module, arguments) * auxiliary.to(loss.device)
    return output


def _check_policy(state: ModelRouting) -> None:
    """A sampled router gets no gradient from the model's own loss: refuse to train it in vain."""
    context = state.context
    if context.policy_gradient:
        return
    for site, routing, _ in context.registered:
        if routing.log_prob_N is not None and routing.log_prob_N.requires_grad:
            raise ConfigError(
                f"the router at {site} samples its experts and is trained by a policy gradient only; this training "
                "loop would leave it without one. Use moe_kit.RoutedTrainer, or freeze_router=True, or run your own "
                "estimator inside `with moe_kit.routing.policy_gradient(model)`."
            )


def loss_share(module: nn.Module, arguments: dict[str, Any]) -> Tensor | float:
    """Share of the optimizer step's label tokens that this micro-batch holds.

    Args:
        module: the inner model.
        arguments: its arguments by name.

    Returns:
        (local label tokens) / `num_items_in_batch`, or 1 if the trainer gave no such number.
    """
    items, labels = arguments.get("num_items_in_batch"), arguments.get("labels")
    if items is None or labels is None:
        return 1.0
    config = getattr(module, "config", None)
    shifted = labels.dim() > 1 and not getattr(config, "is_encoder_decoder", False)
    local = (labels[..., 1:] if shifted else labels) != _IGNORED_LABEL
    return local.sum() / items


def _warn_no_loss(state: ModelRouting) -> None:
    if not getattr(state, "warned_no_loss", False):
        state.warned_no_loss = True
        warnings.warn(
            "moe_kit: the model was called without labels in training mode, so its auxiliary routing losses were not "
            "added to any loss. A trainer that computes its own loss should add "
            "`sum(moe_kit.routing_losses(model).values())` with its coefficients.",
            stacklevel=2,
        )
