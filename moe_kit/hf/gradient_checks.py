"""Refusals of training that would leave a router without a gradient, each a typed error and raised once.

=====================================================  ===============================================================
what would be lost                                     when it is refused
=====================================================  ===============================================================
everything, under reentrant checkpointing              at the forward pass
a sampled router under the model's own loss            at the forward pass
a sampled router under another loss                    before the optimizer's first step on it
auxiliary losses that a training loop did not add      before the optimizer's first step without them
a router that learns from nothing this loss has        at the backward pass through the outputs
=====================================================  ===============================================================

Whether a loop adds an auxiliary loss is not known at the forward pass. So a pass notes which of its tensors a backward
pass reaches: its outputs but not its auxiliary losses means that they are missing from the loss.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from moe_kit.errors import ConfigError
from moe_kit.hf.passes import tensors_of
from moe_kit.routing.state import ATTRIBUTE

if TYPE_CHECKING:
    from moe_kit.hf.hooks import HookedRouting

_NEEDS_POLICY = (
    "samples its experts and is trained by a policy gradient only; this training loop would leave it without one. Use "
    "moe_kit.RoutedTrainer, or freeze_router=True, or run your own estimator inside `with "
    "moe_kit.routing.policy_gradient(model)`."
)

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_global_hook: list[Any] = []


class Watch:
    """What backward passes reached of a model's training passes since the last optimizer step.

    Attributes:
        outputs_used: the gradient of an output was computed.
        losses_used: the gradient of an auxiliary loss was computed.
        names: names of the auxiliary losses.
        unguided: site and router that sampled without a policy gradient, else None.
    """

    def __init__(self) -> None:
        self.outputs_used = self.losses_used = False
        self.names: set[str] = set()
        self.unguided: tuple[str, nn.Module] | None = None


def check_reentrant(state: HookedRouting) -> None:
    """Refuse reentrant checkpointing, which runs layers without a graph: their routers would silently not learn.

    Raises:
        ConfigError: if a trainable router with a loss decided without a graph.
    """
    for site, routing, router in state.context.registered:
        logits = routing.logits_NE
        if logits is None or logits.requires_grad or not router.losses:
            continue
        if any(parameter.requires_grad for parameter in router.parameters()):
            raise ConfigError(
                f"the router at {site} ran without a graph in a training pass, so its auxiliary losses would have no "
                "gradient: gradient checkpointing is reentrant. Use gradient_checkpointing_kwargs="
                "{'use_reentrant': False}."
            )


def check_policy(state: HookedRouting) -> None:
    """Refuse to train a sampled router in vain: the model's own loss gives it no gradient.

    Raises:
        ConfigError: if a trainable router sampled and no policy gradient was announced.
    """
    for site, _ in _unguided(state):
        raise ConfigError(f"the router at {site} {_NEEDS_POLICY}")


def zero_of_policy(state: HookedRouting) -> Tensor | float:
    """Zero that depends on sampled routers.

    Data-parallel training looks for unused parameters in the output of the forward pass and refuses a gradient that
    reaches one of them later, as that of a policy gradient does.

    Args:
        state: routing state of the model.
    """
    terms = [routing.log_prob_N.sum() for _, routing, _ in state.context.registered if routing.log_prob_N is not None]
    return 0.0 * torch.stack(terms).sum() if terms else 0.0


def _unguided(state: HookedRouting) -> list[tuple[str, nn.Module]]:
    if state.context.policy_gradient:
        return []
    return [
        (site, router)
        for site, routing, router in state.context.registered
        if routing.log_prob_N is not None and routing.log_prob_N.requires_grad
    ]


def watch_policy(state: HookedRouting, model: nn.Module) -> None:
    """Where the loss is unknown, look at a sampled router's gradient when an optimizer steps.

    Args:
        state: routing state of the model, its pass just closed.
        model: the inner model.
    """
    unguided = _unguided(state)
    if unguided:
        state.watch.unguided = unguided[0]
        _track(model)


def watch_losses(state: HookedRouting, model: nn.Module, output: Any) -> None:
    """Note whether a backward pass reaches the outputs of a pass, and whether it reaches its auxiliary losses.

    Args:
        state: routing state of the model, its pass just closed.
        model: the inner model.
        output: its output.
    """
    watch = state.watch

    def outputs_used(gradient: Tensor) -> None:
        watch.outputs_used = True

    def losses_used(gradient: Tensor) -> None:
        watch.losses_used = True

    for tensor in tensors_of(output):
        if tensor.requires_grad:
            tensor.register_hook(outputs_used)
    for _, name, loss in state.context.closed_terms:
        if loss.requires_grad:
            watch.names.add(name)
            loss.register_hook(losses_used)
    _track(model)


def change_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Replace the floating-point tensors of a model's output.

    Args:
        output: a tensor, tuple or dictionary of outputs; a dictionary is changed in place.
        change: what makes the new tensor.

    Returns:
        The output.
    """

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(output, tuple):
        return tuple(changed(value) for value in output)
    if not isinstance(output, dict):
        return changed(output)
    for name, value in list(output.items()):
        output[name] = changed(value)
    return output


def refuse_backward(output: Any, message: str) -> Any:
    """Make a backward pass through a model's outputs raise.

    Args:
        output: a model's output.
        message: the error's text.

    Returns:
        The output with equal values.
    """
    anchor = torch.zeros((), requires_grad=True)
    return change_tensors(output, functools.partial(_Refusal.apply, anchor, message))


class _Refusal(torch.autograd.Function):
    """Identity whose backward raises; the anchor makes it a part of the graph where nothing else is trainable."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, message: str, value: Tensor) -> Tensor:
        ctx.message = message
        # trainers multiply a loss in place, which a view of our own forbids
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise ConfigError(ctx.message)


def _track(model: nn.Module) -> None:
    _models.add(model)
    if not _global_hook:
        _global_hook.append(register_optimizer_step_pre_hook(_before_any_step))


def _before_any_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    for model in list(_models):
        state: HookedRouting | None = model.__dict__.get(ATTRIBUTE)
        if state is None:
            continue
        watch = state.watch
        lost = watch.outputs_used and not watch.losses_used
        if lost and not _held(optimizer, model):
            # the step of another model
            continue
        if watch.unguided is not None and not _held(optimizer, watch.unguided[1]):
            continue
        state.watch = Watch()
        if watch.unguided is not None:
            site, router = watch.unguided
            if not any(p.grad is not None and bool(p.grad.any()) for p in _held(optimizer, router)):
                raise ConfigError(f"the router at {site} {_NEEDS_POLICY}")
        if lost:
            raise ConfigError(
                f"the optimizer steps on a loss without the auxiliary losses of the routers ({', '.join(sorted(watch.names))}): "
                "this training loop computes its own loss from the model's outputs. Add "
                "`moe_kit.routing.weighted_routing_loss(model)` to that loss before its backward pass, or set losses={} "
                "in the adapter's configuration to train without them."
            )


def _held(optimizer: Optimizer, module: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of a module that an optimizer steps on."""
    own = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    return [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
