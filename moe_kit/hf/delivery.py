"""How auxiliary losses reach the loss that is trained: with our coefficient, once, whoever computes that loss.

=================================================  ===================================================================
the loss is computed by                            how the auxiliary losses get into it
=================================================  ===================================================================
the model, given labels                            the closing hook adds them to it
a transformers Trainer, all of TRL included        if its loss does not depend on them (label smoothing, compute_loss_func,
                                                   preferences, rewards, fused heads, a compute_loss of the user's) they
                                                   are added when it hands its loss to `accelerator.backward`
any other training loop                            it adds `weighted_routing_loss(model)`; an optimizer that steps without
                                                   is refused (see `gradient_checks.py`)
=================================================  ===================================================================

A loss "depends on them" is read off its graph, at the last moment before the backward pass. So nothing has to be known
about a trainer: which outputs it reads, what its own coefficient for router losses is, or the base model's. What is
added counts each micro-batch of a step equally; several passes of one micro-batch count as their mean.

Two other ways were weighed. Returning them as `outputs.aux_loss`, as a mixture of experts does: trainers multiply it by
a coefficient of theirs, many base models have none, and a reward trainer never asks. Attaching their gradient to an
output in its backward pass: it needs the factor between the trained loss and the one that the optimizer sees
(accumulation, mixed precision), which only the trainer knows.

TRL logs `aux_loss` for models whose configuration has `output_router_logits`. So a dense model whose adapters have
auxiliary losses gets that entry, and their value, without a gradient, is returned under that name; it is taken off with
the adapters. The base model itself never sees the request unless it has routers of its own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_kit.hf.gradient_checks import (
    change_tensors,
    check_policy,
    check_reentrant,
    refuse_backward,
    tensors_of,
    watch_losses,
    watch_policy,
    zero_of_policy,
)

if TYPE_CHECKING:
    from moe_kit.hf.hooks import HookedRouting

__all__ = [
    "announce",
    "announced",
    "check_policy",
    "check_reentrant",
    "deliver",
    "depends_on",
    "strip_request",
    "withdraw",
    "zero_of_policy",
]

_REQUEST = "output_router_logits"
_COEFFICIENT = "router_aux_loss_coef"
_ANNOUNCED = "moe_routing_announced"


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
    """Note that the caller logs `outputs.aux_loss`; a base without routers must not be asked for theirs.

    Args:
        state: routing state of the model.
        model: the inner model.
        kwargs: keyword arguments of the call.

    Returns:
        Changed keyword arguments, or None if they may stay.
    """
    state.wants_aux_loss = bool(kwargs.get(_REQUEST)) and announced(model)
    if not announced(model):
        return None
    if kwargs.get("fused_lm_head"):
        # TRL's own forward would read the configuration where the argument is missing
        return {**kwargs, _REQUEST: False}
    return {name: value for name, value in kwargs.items() if name != _REQUEST} if _REQUEST in kwargs else None


def deliver(
    state: HookedRouting,
    model: nn.Module,
    auxiliary: Tensor | None,
    loss: Tensor | None,
    output: Any,
    fused: bool = False,
) -> Any:
    """See to it that the auxiliary losses of a pass reach the loss that is trained.

    Args:
        state: routing state of the model, its pass just closed.
        model: the inner model.
        auxiliary: weighted sum of the auxiliary losses of a training pass; None if there is none.
        loss: the model's loss, which contains them; None if it has none.
        output: the model's output; gets `aux_loss` if the caller logs it.
        fused: the call is one of TRL's, which reads other outputs than the loss.

    Returns:
        The output.
    """
    learning = model.training and torch.is_grad_enabled()
    if state.wants_aux_loss and (fused or not learning) and not isinstance(output, tuple):
        zero = torch.zeros((), device=next(iter(tensors_of(output))).device)
        output.aux_loss = zero if auxiliary is None else auxiliary.detach()
    if not learning:
        return output
    if loss is None:
        watch_policy(state, model)
    if state.untaught is not None and not torch.compiler.is_compiling():
        output = refuse_backward(output, state.untaught)
    if auxiliary is None or not auxiliary.requires_grad:
        return output
    if loss is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        output = _tied(state, output)
    if not torch.compiler.is_compiling():
        _follow(state, model, output, auxiliary)
    elif loss is None or fused:
        # a trainer with a loss of its own is worth the break of the graph
        if _compiled_for_a_trainer():
            _follow_eagerly(state, model, output, auxiliary)
        else:
            warnings.warn(
                "moe_kit: in a compiled model the auxiliary routing losses reach the model's own loss only. Add "
                "`moe_kit.routing.weighted_routing_loss(model)` to a loss of your own.",
                stacklevel=2,
            )
    return output


def _follow(state: HookedRouting, model: nn.Module, output: Any, auxiliary: Tensor) -> None:
    watch_losses(state, model, output)
    step = _training_step()
    if step is not None:
        _at_backward(*step, state, auxiliary)


@torch.compiler.disable
def _follow_eagerly(state: HookedRouting, model: nn.Module, output: Any, auxiliary: Tensor) -> None:
    _follow(state, model, output, auxiliary)


@torch.compiler.assume_constant_result
def _compiled_for_a_trainer() -> bool:
    # a compiler calls this while the trainer waits for its first pass
    return _training_step() is not None


def depends_on(loss: Tensor, terms: Sequence[Tensor]) -> bool:
    """Whether a loss was computed from one of some tensors, read off its graph.

    Only nodes made after the oldest of the tensors can depend on them, so the search stays within what the training
    loop computed from the model's outputs.

    Args:
        loss: a loss.
        terms: tensors with a graph.
    """
    wanted = {term.grad_fn for term in terms if term.grad_fn is not None}
    if not wanted:
        return False
    oldest = min(node._sequence_nr() for node in wanted)
    seen: set[tuple[Any, int]] = set()
    ahead = [(loss.grad_fn, 0)]
    while ahead:
        edge = ahead.pop()
        node, position = edge
        if node is None or edge in seen:
            continue
        seen.add(edge)
        if node in wanted:
            return True
        if node._sequence_nr() < oldest:
            continue
        following = node.next_functions
        if node.name() == "_DDPSinkBackward":
            # data parallelism passes all outputs through one identity
            following = following[position : position + 1]
        ahead.extend(following)
    return False


class _Backward:
    """Stands for `accelerator.backward` during one training step and adds what the trainer's loss lacks.

    Args:
        trainer: the trainer.
        frame: its call of `training_step`, which tells one step from the next.
    """

    def __init__(self, trainer: Any, frame: FrameType) -> None:
        self.trainer, self.frame = trainer, frame
        self.passes: dict[HookedRouting, list[tuple[Tensor, list[Tensor]]]] = {}

    def __call__(self, loss: Tensor, **kwargs: Any) -> Any:
        """Hand the loss on to the accelerator.

        Args:
            loss: the trainer's loss, its part of the optimizer step.
            **kwargs: as for the accelerator.
        """
        accelerator = self.trainer.accelerator
        del accelerator.backward
        for passes in self.passes.values():
            if not any(depends_on(loss, terms) for _, terms in passes):
                total = torch.stack([auxiliary.to(loss.device) for auxiliary, _ in passes]).mean()
                loss = loss + total / self.trainer.current_gradient_accumulation_steps
        return accelerator.backward(loss, **kwargs)


def _at_backward(trainer: Any, frame: FrameType, state: HookedRouting, auxiliary: Tensor) -> None:
    accelerator = trainer.accelerator
    waiting = vars(accelerator).get("backward")
    if not isinstance(waiting, _Backward) or waiting.frame is not frame:
        # what a step that died has left behind is replaced
        waiting = accelerator.backward = _Backward(trainer, frame)
    terms = [loss for _, _, loss in state.context.closed_terms]
    waiting.passes.setdefault(state, []).append((auxiliary, terms))


def _training_step() -> tuple[Any, FrameType] | None:
    """The trainer that calls the model, and its call of `training_step`; None in any other training loop.

    A model does not know its trainer, and no hook of it sees the trainer's loss. The call stack knows both.
    """
    library = sys.modules.get("transformers.trainer")
    frame: FrameType | None = None if library is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "training_step":
            trainer = frame.f_locals.get("self")
            if isinstance(trainer, library.Trainer):
                return trainer, frame
        frame = frame.f_back
    return None


class _Tie(torch.autograd.Function):
    """Identity of a value that also depends on other tensors, which get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *(torch.zeros_like(other) for other in ctx.saved_tensors)


def _tied(state: HookedRouting, output: Any) -> Any:
    """Let the outputs depend on the routers' scores, where data parallelism looks for unused parameters."""
    scores = [routing.logits_NE for _, routing, router in state.context.registered if router.losses]
    scores = [score for score in scores if score is not None and score.requires_grad]
    one = next(iter(tensors_of(output)), None)
    if not scores or one is None:
        return output
    return change_tensors(output, lambda value: _Tie.apply(value, *scores) if value is one else value)
