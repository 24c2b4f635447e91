"""How auxiliary losses reach a trainer that computes its own loss, and what is refused because they cannot.

=========================================  ====================================================================
the trainer                                what happens
=========================================  ====================================================================
uses the model's loss (stock Trainer)      the closing hook adds them to it
TRL: SFT, DPO, KTO, GRPO, RLOO             they asked for `output_router_logits`: returned as `outputs.aux_loss`, which
                                           the trainer adds with `router_aux_loss_coef` (1 unless set: our coefficients
                                           are in already) and its own scale
any other (label smoothing, own loss)      one warning that names `routing_losses`
=========================================  ====================================================================

TRL takes a model for a mixture of experts if its configuration has `output_router_logits`. So a model whose adapters
have auxiliary losses gets that entry; it is taken off with the adapters. The base model itself never sees the request
unless it has routers of its own.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from moe_kit.errors import ConfigError

if TYPE_CHECKING:
    from moe_kit.hf.hooks import HookedRouting

_REQUEST = "output_router_logits"
_COEFFICIENT = "router_aux_loss_coef"
_ANNOUNCED = "moe_routing_announced"

_NEEDS_POLICY = (
    "samples its experts and is trained by a policy gradient only; this training loop would leave it without one. Use "
    "moe_kit.RoutedTrainer, or freeze_router=True, or run your own estimator inside `with "
    "moe_kit.routing.policy_gradient(model)`."
)


def announce(model: nn.Module) -> None:
    """Make a model say in its configuration that it returns an auxiliary loss, as a mixture of experts does.

    Args:
        model: the inner model; a model that says so already is left as it is.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return
    text = config.get_text_config()
    if not hasattr(text, _REQUEST):
        setattr(text, _REQUEST, False)
        setattr(text, _COEFFICIENT, 1.0)
        model.__dict__[_ANNOUNCED] = True


def announced(model: nn.Module) -> bool:
    """Whether a model speaks of router logits only because of `announce`, and has no routers of its own."""
    return bool(model.__dict__.get(_ANNOUNCED, False))


def withdraw(model: nn.Module) -> None:
    """Undo `announce`."""
    if model.__dict__.pop(_ANNOUNCED, False):
        text = model.config.get_text_config()
        for name in (_REQUEST, _COEFFICIENT):
            if hasattr(text, name):
                delattr(text, name)


def strip_request(state: HookedRouting, model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Note that the caller wants `outputs.aux_loss`; a base without routers must not be asked for theirs.

    Args:
        state: routing state of the model.
        model: the inner model.
        kwargs: keyword arguments of the call.

    Returns:
        Changed keyword arguments, or None if they may stay.
    """
    state.wants_aux_loss = bool(kwargs.get(_REQUEST))
    if not model.__dict__.get(_ANNOUNCED):
        return None
    if kwargs.get("fused_lm_head"):
        # TRL's own forward would read the configuration where the argument is missing
        return {**kwargs, _REQUEST: False}
    return {name: value for name, value in kwargs.items() if name != _REQUEST} if _REQUEST in kwargs else None


def deliver(
    state: HookedRouting, model: nn.Module, loss: Tensor | None, arguments: dict[str, Any], output: Any
) -> None:
    """Hand the auxiliary loss to a caller that does not use the model's loss, or warn once that it got lost.

    Args:
        state: routing state of the model.
        model: the inner model.
        loss: the model's loss, if it has one.
        arguments: arguments of the call by name.
        output: the model's output; gets `aux_loss` if the caller asked for it.
    """
    learning = model.training and torch.is_grad_enabled()
    auxiliary = state.total_loss()
    fused = bool(arguments.get("fused_lm_head"))
    if state.wants_aux_loss and (fused or not learning):
        own = getattr(output, "aux_loss", None)
        ours = torch.zeros((), device=_device_of(output)) if auxiliary is None else auxiliary
        # the trainer multiplies by the configuration's coefficient, which ours must not get twice
        coefficient = getattr(model.config.get_text_config(), _COEFFICIENT, 1.0)
        output.aux_loss = ours / coefficient if own is None else own + ours / coefficient
        return
    if not learning:
        return
    if loss is None:
        _watch_policy(state)
    if state.collects and auxiliary is not None:
        state.collected = auxiliary
        return
    if auxiliary is not None and not state.warned_no_loss:
        state.warned_no_loss = True
        warnings.warn(
            "moe_kit: the auxiliary routing losses did not reach the training loss: the model was called in training "
            "mode without labels, or by a trainer that computes its own loss. Add "
            "`moe_kit.routing.weighted_routing_loss(model)` to that loss, or use moe_kit.RoutedTrainer, which does.",
            stacklevel=2,
        )


@contextmanager
def collecting(state: HookedRouting) -> Iterator[None]:
    """Inside this block auxiliary losses that no model loss can take are kept in `state.collected`, without a warning.

    Args:
        state: routing state of the model.
    """
    state.collects, state.collected = True, None
    try:
        yield
    finally:
        state.collects = False


def _device_of(output: Any) -> torch.device:
    return next(value.device for value in output.values() if isinstance(value, Tensor))


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


def _watch_policy(state: HookedRouting) -> None:
    """Where the trainer's loss is unknown, look at the router's gradient when an optimizer steps."""
    unguided = _unguided(state)
    if not unguided or state.watches_policy:
        return
    state.watches_policy = True
    site, router = unguided[0]
    watched = [weakref.ref(parameter) for parameter in router.parameters() if parameter.requires_grad]

    def check(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        alive = {id(parameter) for parameter in (reference() for reference in watched) if parameter is not None}
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in alive]
        if alive and not held:
            # an optimizer of something else
            return
        handle.remove()
        state.watches_policy = False
        if held and not any(p.grad is not None and bool(p.grad.any()) for p in held):
            raise ConfigError(f"the router at {site} {_NEEDS_POLICY}")

    handle = register_optimizer_step_pre_hook(check)
