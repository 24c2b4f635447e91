"""State that moves once an optimizer step: balance biases, thresholds, sparsity controllers, schedules.

A `StepState` counts during the forward passes of a step (once each, never in recomputation) and moves its values by
the counts of all processes after the optimizer's step. Counters are plain attributes; what moves is kept in frozen
float32 parameters.

State moves only with what trains. A pass counts if it ran in training mode with gradients on (or as a sample of a policy
gradient, which may run without), if router and experts are not frozen, if its forward came to its end, and if its
backward, once begun, did too: batches that ran out of memory leave nothing behind.

`routing_step` is called by a hook behind `Optimizer.step`, so it runs under any trainer, fused optimizers and ZeRO
included, once for all micro-batches of an accumulated step, and moves what the stepping optimizer trains. Where each
parameter has an optimizer that steps inside the backward, the first that holds one of the router's moves it. Optimizers that
are no `torch.optim.Optimizer` need a call of `routing_step(model)` after each step.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from moe_kit.routing.decision import Routing
from moe_kit.routing.frozen import HoldsFrozen, gathered, is_partitioned

_EXPLICIT = "moe_routing_step_hook"
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_global_hook: list[Any] = []


class StepState(HoldsFrozen, ABC):
    """A part of a router that counts in the forward pass and moves once an optimizer step.

    Args:
        size: length of the vector that `measure` returns.

    Attributes:
        counter: float64 [size], sum of the measures since the last step; None before the first.
        contributions: number of measures that it is the sum of; infinite with one of a compiled pass, which stays.
        moved: number of moves so far, which tells the counts of one step from those of the next.
        passes: those of the passes counted whose backward has begun and not ended.
        pooled: states of equal `pool_key` at all sites of a model share their counts, so that they move as one.
    """

    pooled: bool = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.counter: Tensor | None = None
        self.contributions: float = 0
        self.moved = 0
        self.passes: list[PassCounts] = []

    def choice_scores(self, logits_NE: Tensor) -> Tensor:
        """Scores that the selection sees; the logits themselves unless a bias is kept.

        Args:
            logits_NE: float32 [N, E].
        """
        return logits_NE

    def forward(self, logits_NE: Tensor) -> Tensor:
        """`choice_scores`, as a call of the module, so that hooks bring its values where they are offloaded or sharded.

        Args:
            logits_NE: float32 [N, E].
        """
        return self.choice_scores(logits_NE)

    def loss_factor(self, name: str) -> Tensor | float:
        """Factor on the coefficient of the auxiliary loss `name`, 1 unless this state controls it."""
        return 1.0

    def pool_key(self) -> tuple:
        """States of equal key move as one when `pooled`."""
        return (type(self).__name__, self.size)

    @abstractmethod
    def measure(self, routing: Routing) -> Tensor:
        """What one decision of a training forward adds to the counter.

        Args:
            routing: the decision.

        Returns:
            [size]; sums over micro-batches and processes must mean something.
        """

    def moves(self) -> list[Tensor]:
        """Parameters that `update` changes."""
        return list(self.parameters())

    @abstractmethod
    def update(self, total: Tensor) -> None:
        """Move, given the counts of a whole step over all processes.

        Args:
            total: float64 [size].
        """

    def observe(self, routing: Routing, counts: PassCounts | None = None) -> None:
        """Count a decision; no gradient, no wait for the device.

        Args:
            routing: the decision.
            counts: of the pass that it belongs to; None = it counts at once.
        """
        with torch.no_grad():
            measured = self.measure(routing).double()
        if counts is None:
            self.add(measured)
        else:
            counts.entries.append((self, measured))

    def add(self, measured: Tensor) -> None:
        """Add to the counter.

        Args:
            measured: float64 [size].
        """
        self.counter = measured if self.counter is None else self.counter.to(measured.device) + measured
        if torch.compiler.is_compiling():
            # a number that is read here would be compiled in
            self.contributions = math.inf
        else:
            self.contributions += 1

    def subtract(self, measured: Tensor) -> None:
        """Undo an `add` of this step.

        Args:
            measured: float64 [size].
        """
        self.contributions -= 1
        # zeros would move a state, as counts do
        if self.contributions <= 0 or self.counter is None:
            self.counter = None
        else:
            self.counter = self.counter - measured.to(self.counter.device)

    def restart(self) -> None:
        """Begin the counts of the next step."""
        self.counter, self.contributions, self.passes = None, 0, []
        self.moved += 1


class PassCounts:
    """Counts of one forward pass, which join those of the step when it ends.

    Attributes:
        entries: (state, what it measured).
        steps: number of moves of each entry's state when the pass was counted.
        in_backward: a backward pass through this one has begun and not ended.
        died: that backward pass was given up.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[StepState, Tensor]] = []
        self.steps: list[int] = []
        self.in_backward = False
        self.died = False

    def commit(self, outputs: Iterable[Any] = ()) -> None:
        """Count the pass, whose forward has ended.

        Args:
            outputs: what it returned: a gradient that reaches one of these tensors begins its backward.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            withdraw_dead(state for state, _ in self.entries)
        for state, measured in self.entries:
            state.add(measured)
        if compiling:
            # a compiled graph takes no hook
            return
        self.steps = [state.moved for state, _ in self.entries]
        reached = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
        if self.entries and reached:
            for value in reached:
                value.register_hook(self._begin)

    def _begin(self, gradient: Tensor) -> None:
        if not self.in_backward:
            self.in_backward = True
            for state, _ in self.entries:
                state.passes.append(self)
            torch.autograd.Variable._execution_engine.queue_callback(_Ending(self))

    def end(self) -> None:
        """Note that the backward has come to its end."""
        self.in_backward = False
        for state, _ in self.entries:
            state.passes = [counts for counts in state.passes if counts is not self]

    def withdraw(self) -> None:
        """Take the pass back if its backward died; one that runs, as where optimizers step inside it, has not."""
        if self.in_backward and (self.died or backward_task() == -1):
            for (state, measured), step in zip(self.entries, self.steps):
                state.passes = [counts for counts in state.passes if counts is not self]
                if state.moved == step:
                    state.subtract(measured)
            self.entries, self.steps = [], []


class _Ending:
    """What autograd calls when a backward pass ends; one that dies lets go of it uncalled."""

    def __init__(self, counts: PassCounts) -> None:
        self.counts = counts
        self.called = False

    def __call__(self) -> None:
        self.called = True
        self.counts.end()

    def __del__(self) -> None:
        if not self.called:
            self.counts.died = True


def withdraw_dead(states: Iterable[StepState]) -> None:
    """Take back the passes whose backward died.

    Args:
        states: the states that counted them.
    """
    for counts in {id(counts): counts for state in states for counts in state.passes}.values():
        counts.withdraw()


def backward_task() -> int:
    """Number of the backward pass that is under way in this thread, -1 for none and while compiling."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class StepOwner(nn.Module, ABC):
    """A module whose step states move when it is trained: a router."""

    @property
    @abstractmethod
    def step_states(self) -> list[StepState]:
        """Its states, in the order in which they move."""

    @property
    @abstractmethod
    def is_frozen(self) -> bool:
        """True if its states must stay as they are."""

    @abstractmethod
    def trained_with(self) -> list[nn.Parameter]:
        """Parameters whose optimizer moves the states; empty if nothing tells."""


def step_states(model: nn.Module) -> list[StepState]:
    """All parts of a model that move once a step, in module order.

    Args:
        model: any module.
    """
    return [module for module in model.modules() if isinstance(module, StepState)]


def routing_step(model: nn.Module) -> None:
    """Move all step states of a model from the counts since the last call, summed over all processes.

    Does nothing if no training forward was counted since the last call, so a second optimizer of the same model is
    harmless. With torch.distributed running, every process must call it. States of frozen routers stay.

    Args:
        model: a model with routers.
    """
    kept = {id(state) for owner in _owners(model) if owner.is_frozen for state in owner.step_states}
    _move([state for state in step_states(model) if id(state) not in kept])


@torch.no_grad()
def _move(states: list[StepState]) -> None:
    device = next((state.counter.device for state in states if state.counter is not None), None)
    withdraw_dead(states)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    idle = all(state.counter is None for state in states)
    # other processes may have counted where the passes of this one died
    if device is None or (idle and not distributed):
        return
    counters = [
        torch.zeros(state.size, dtype=torch.float64, device=device)
        if state.counter is None
        else state.counter.to(device)
        for state in states
    ]
    flat = torch.cat([*counters, counters[0].new_tensor([float(not idle)])])
    if distributed:
        torch.distributed.all_reduce(flat)
    if idle and not flat[-1]:
        return
    totals = flat[:-1].split([state.size for state in states])
    pools: dict[tuple, Tensor] = {}
    for state, total in zip(states, totals):
        if state.pooled:
            key = state.pool_key()
            pools[key] = pools[key] + total if key in pools else total
    # a state may hold values of others: one that freezes them does
    parameters = {id(value): value for state in states for value in state.moves()}
    with gathered(list(parameters.values())):
        for state, total in zip(states, totals):
            state.update(pools[state.pool_key()] if state.pooled else total)
            state.restart()


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
    """Move the step states of a model after the step of whichever optimizer trains them.

    One hook on all optimizers of the process looks for routers whose trainable parameters (or those of their experts,
    for routers without) the stepping optimizer holds. So trainers that know nothing of routers move them too, and
    an adapter that this optimizer does not hold stays as it is. Doing it twice changes nothing.

    Args:
        model: a model with routers; only a weak reference is kept.
    """
    _models.add(model)
    if not _global_hook:
        _global_hook.append(register_optimizer_step_post_hook(_after_any_step))


def _after_any_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    held: set[int] | None = None
    for model in list(_models):
        if model.__dict__.get(_EXPLICIT):
            continue
        states = step_states(model)
        if all(state.counter is None for state in states):
            continue
        if held is None:
            held = {id(value) for group in optimizer.param_groups for value in group["params"]}
        if partitioned := _partitions(model, optimizer):
            held = held | {id(value) for value in partitioned}
        if not _any_in(model.parameters(), held):
            continue
        frozen: set[int] = set()
        others: set[int] = set()
        for owner in _owners(model):
            trained = owner.trained_with()
            if owner.is_frozen:
                frozen.update(map(id, owner.step_states))
            elif trained and not _any_in(trained, held):
                others.update(map(id, owner.step_states))
        moving = [state for state in states if id(state) not in frozen | others]
        if backward_task() != -1:
            # each parameter has its own optimizer, but what is pooled moves as one
            pools = {state.pool_key() for state in moving if state.pooled and state.counter is not None}
            pooled = {id(state) for state in states if state.pooled and state.pool_key() in pools} - frozen
            moving = [state for state in states if id(state) in pooled.union(map(id, moving))]
            # a router has several parameters, and the state moves with the first of them
            moving = [state for state in moving if state.counter is not None]
        _move(moving)


def _partitions(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters whose flat partitions a stepping optimizer holds under DeepSpeed's ZeRO, which knows them by no identity.

    ZeRO leaves on a parameter which of its optimizers partitions it; stages 1 and 2 only in the processes that keep a
    part of it, so one such link speaks for all that stand in the same group of processes.
    """
    values = [value for value in model.parameters() if is_partitioned(value)]
    if not values:
        return []
    engines = [getattr(value, "_z3_optimizer", None) or getattr(value, "_zero_optimizer", None) for value in values]
    inner = [getattr(engine, "optimizer", None) for engine in engines if engine is not None]
    if inner:
        return values if any(found is optimizer for found in inner) else []
    # this process keeps no part of the model: the partitions are flat, and no parameter of it
    flat = [value for group in optimizer.param_groups for value in group["params"]]
    return values if all(value.dim() == 1 for value in flat) else []


def _owners(model: nn.Module) -> list[StepOwner]:
    return [module for module in model.modules() if isinstance(module, StepOwner)]


def _any_in(parameters: Iterable[nn.Parameter], held: set[int]) -> bool:
    return any(id(value) in held for value in parameters if value.requires_grad)
