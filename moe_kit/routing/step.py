"""State that moves once an optimizer step: balance biases, thresholds, sparsity controllers, schedules.

A `StepState` counts during the forward passes of a step (once each, never in recomputation) and updates its buffers
from the counts of all processes after the optimizer's step. Counters are plain attributes: distributed training
broadcasts buffers in every forward and would overwrite them. What moves is kept in float32 buffers, which are saved.

`routing_step` is called by a hook behind `Optimizer.step`, so it runs under any trainer, fused optimizers included,
and once for all micro-batches of an accumulated step. Optimizers that are no `torch.optim.Optimizer` (DeepSpeed's)
need a call of `routing_step(model)` after each step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from moe_kit.routing.decision import Routing

_EXPLICIT = "moe_routing_step_hook"
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_global_hook: list[Any] = []


class StepState(nn.Module):
    """A part of a router that counts in the forward pass and moves once an optimizer step.

    Args:
        size: length of the vector that `measure` returns.

    Attributes:
        counter: float64 [size], sum of the measures since the last step; None before the first.
        pooled: states of equal `pool_key` at all sites of a model share their counts, so that they move as one.
    """

    pooled: bool = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.counter: Tensor | None = None

    def choice_scores(self, logits_NE: Tensor) -> Tensor:
        """Scores that the selection sees; the logits themselves unless a bias is kept.

        Args:
            logits_NE: float32 [N, E].
        """
        return logits_NE

    def loss_factor(self, name: str) -> Tensor | float:
        """Factor on the coefficient of the auxiliary loss `name`, 1 unless this state controls it."""
        return 1.0

    def pool_key(self) -> tuple:
        """States of equal key move as one when `pooled`."""
        return (type(self).__name__, self.size)

    def measure(self, routing: Routing) -> Tensor:
        """What one decision of a training forward adds to the counter.

        Args:
            routing: the decision.

        Returns:
            [size]; sums over micro-batches and processes must mean something.
        """
        raise NotImplementedError

    def update(self, total: Tensor) -> None:
        """Move, given the counts of a whole step over all processes.

        Args:
            total: float64 [size].
        """
        raise NotImplementedError

    def observe(self, routing: Routing) -> None:
        """Add a decision to the counter; no gradient, no wait for the device."""
        with torch.no_grad():
            measured = self.measure(routing).double()
            self.counter = measured if self.counter is None else self.counter.to(measured.device) + measured


def step_states(model: nn.Module) -> list[StepState]:
    """All parts of a model that move once a step, in module order.

    Args:
        model: any module.
    """
    return [module for module in model.modules() if isinstance(module, StepState)]


@torch.no_grad()
def routing_step(model: nn.Module) -> None:
    """Move all step states of a model from the counts since the last call, summed over all processes.

    Does nothing if no training forward was counted since the last call, so a second optimizer of the same model is
    harmless. With torch.distributed running, every process must call it.

    Args:
        model: a model with routers.
    """
    states = step_states(model)
    if all(state.counter is None for state in states):
        return
    device = next(state.counter.device for state in states if state.counter is not None)
    flat = torch.cat(
        [
            torch.zeros(state.size, dtype=torch.float64, device=device)
            if state.counter is None
            else state.counter.to(device)
            for state in states
        ]
    )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    totals = list(flat.split([state.size for state in states]))
    pools: dict[tuple, Tensor] = {}
    for state, total in zip(states, totals):
        if state.pooled:
            key = state.pool_key()
            pools[key] = pools[key] + total if key in pools else total
    for state, total in zip(states, totals):
        state.update(pools[state.pool_key()] if state.pooled else total)
        state.counter = None


def install_step_hook(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Call `routing_step(model)` after every step of an optimizer.

    Not needed for models wrapped by `get_peft_model`: see `track`. A model with a hook of its own is left out there.

    Args:
        optimizer: any torch optimizer, fused ones included.
        model: a model with routers.

    Returns:
        A handle; `handle.remove()` takes the hook off.
    """
    model.__dict__[_EXPLICIT] = True
    reference = weakref.ref(model)

    def after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        found = reference()
        if found is not None:
            routing_step(found)

    return optimizer.register_step_post_hook(after_step)


def track(model: nn.Module) -> None:
    """Move the step states of a model after the step of whichever optimizer holds its parameters.

    One hook on all optimizers of the process looks for tracked models whose trainable parameters the stepping
    optimizer holds. So trainers that know nothing of routers move them too. Doing it twice changes nothing.

    Args:
        model: a model with routers; only a weak reference is kept.
    """
    _models.add(model)
    if not _global_hook:
        _global_hook.append(register_optimizer_step_post_hook(_after_any_step))


def _after_any_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    held: set[int] | None = None
    for model in list(_models):
        if model.__dict__.get(_EXPLICIT) or all(state.counter is None for state in step_states(model)):
            continue
        if held is None:
            held = {id(value) for group in optimizer.param_groups for value in group["params"]}
        if _any_in(model.parameters(), held):
            routing_step(model)


def _any_in(parameters: Iterable[nn.Parameter], held: set[int]) -> bool:
    return any(id(value) in held for value in parameters if value.requires_grad)
