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
added counts each micro-batch of a step equally; several passes of one loss count as their mean. A trainer with several
losses in a step hands each to `accelerator.backward`; each brings the auxiliary losses of the passes it depends on.

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
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_kit.hf.gradient_checks import (
    change_tensors,
    refuse_backward,
    watch_losses,
    watch_policy,
)
from moe_kit.hf.passes import Call, tensors_of

if TYPE_CHECKING:
    from moe_kit.hf.hooks import HookedRouting

__all__ = [
    "announce",
    "announced",
    "deliver",
    "depends_on",
    "strip_request",
    "unannounce",
]

_REQUEST = "output_router_logits"
_COEFFICIENT = "router_aux_loss_coef"
_ANNOUNCED = "moe_routing_announced"
_STEP = "moe_routing_step"


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


def unannounce(model: nn.Module) -> None:
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
        zero = torch.zeros((), device=tensors_of(output)[0].device)
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
        _at_backward(*step, state, auxiliary, output)


_follow_eagerly = torch.compiler.disable(_follow)


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
    return _reaches(loss, {term.grad_fn for term in terms if term.grad_fn is not None})


def _reaches(loss: Tensor, wanted: set[Any], call: Call | None = None) -> bool:
    """Whether the graph of a loss has one of some nodes, or one that was made in a call."""
    numbers = [node._sequence_nr() for node in wanted] + ([] if call is None else [call.start])
    if not numbers:
        return False
    oldest = min(numbers)
    seen: set[tuple[Any, int]] = set()
    ahead = [(loss.grad_fn, 0)]
    while ahead:
        edge = ahead.pop()
        node, position = edge
        if node is None or edge in seen:
            continue
        seen.add(edge)
        number = node._sequence_nr()
        if node in wanted or (call is not None and call.holds(number)):
            return True
        if number < oldest:
            continue
        following = node.next_functions
        if node.name() == "_DDPSinkBackward":
            # data parallelism passes all outputs through one identity
            following = following[position : position + 1]
        ahead.extend(following)
    return False


class _Step:
    """Lives as long as one call of `training_step`, whose frame alone holds it.

    The frame itself tells one step from the next as well, but who holds it holds the step's inputs and graph.
    """


@dataclass(eq=False)
class _Noted:
    """A training pass whose auxiliary losses wait for the loss that depends on it.

    Attributes:
        auxiliary: their weighted sum.
        terms: each of them.
        ends: nodes of its outputs.
        call: numbers of its nodes, which find hidden values that a hook took; None where it was compiled.
    """

    auxiliary: Tensor
    terms: list[Tensor]
    ends: set[Any]
    call: Call | None

    def leads_to(self, loss: Tensor) -> bool:
        """Whether a loss was computed from this pass.

        Args:
            loss: a loss.
        """
        return _reaches(loss, self.ends, self.call) or depends_on(loss, self.terms)


class _Backward:
    """Stands for `accelerator.backward` while passes of one training step wait, and adds what a loss lacks.

    Args:
        trainer: the trainer.
        step: its training step; when it ends, what stood there before stands there again.
    """

    def __init__(self, trainer: Any, step: _Step) -> None:
        self.trainer, self.accelerator = trainer, trainer.accelerator
        self.step = weakref.ref(step)
        self.passes: dict[HookedRouting, list[_Noted]] = {}
        # somebody's wrapper of this accelerator's method, or the method of its class
        self.replaced = vars(self.accelerator).get("backward")
        self.backward = self.accelerator.backward
        self.accelerator.backward = self
        weakref.finalize(step, self.end).atexit = False

    def __call__(self, loss: Tensor, **kwargs: Any) -> Any:
        """Hand a loss on to the accelerator.

        Args:
            loss: a loss of the trainer's, its part of the optimizer step.
            **kwargs: as for the accelerator.
        """
        total = loss
        for state, passes in self.passes.items():
            used = [noted for noted in passes if noted.leads_to(loss)]
            self.passes[state] = [noted for noted in passes if noted not in used]
            if used and not any(depends_on(loss, noted.terms) for noted in used):
                mean = torch.stack([noted.auxiliary.to(loss.device) for noted in used]).mean()
                total = total + mean / self.trainer.current_gradient_accumulation_steps
        if not any(self.passes.values()):
            self.end()
        return self.backward(total, **kwargs)

    def end(self) -> None:
        """Forget the passes and put back what was replaced; doing it twice changes nothing."""
        self.passes.clear()
        if vars(self.accelerator).get("backward") is not self:
            return
        if self.replaced is None:
            del self.accelerator.backward
        else:
            self.accelerator.backward = self.replaced


def _at_backward(trainer: Any, step: _Step, state: HookedRouting, auxiliary: Tensor, output: Any) -> None:
    waiting = vars(trainer.accelerator).get("backward")
    if isinstance(waiting, _Backward) and waiting.step() is not step:
        # a step that died, and is held by its traceback
        waiting.end()
        waiting = None
    if not isinstance(waiting, _Backward):
        waiting = _Backward(trainer, step)
    terms = [loss for _, _, loss in state.context.closed_terms]
    ends = {tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None}
    call = state.current.calls[0] if state.opened_eagerly else None
    waiting.passes.setdefault(state, []).append(_Noted(auxiliary, terms, ends, call))


def _training_step() -> tuple[Any, _Step] | None:
    """The trainer that calls the model, and what its call of `training_step` holds; None in any other training loop.

    A model does not know its trainer, and no hook of it sees the trainer's loss. The call stack knows both.
    """
    library = sys.modules.get("transformers.trainer")
    frame: FrameType | None = None if library is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "training_step":
            trainer = frame.f_locals.get("self")
            if isinstance(trainer, library.Trainer):
                return trainer, frame.f_locals.setdefault(_STEP, _Step())
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
    if not scores:
        return output
    # one output is enough
    first = iter((True,))
    return change_tensors(output, lambda value: _Tie.apply(value, *scores) if next(first, False) else value)
