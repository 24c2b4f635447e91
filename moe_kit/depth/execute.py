"""Carrying out a per-sequence decision: skip without work, repeat with a cache slot of its own, group mixed rows.

    0 skip         y = x                1 execute      y = F(x)
    2 repeat       y = F(F(x))          3 approximate  y = x + G(x)

for a decoder layer; for an attention or MLP the residual is added outside, so a skip returns zeros and a forecast G(x).
A row that skips has no keys in that layer. In a mixed batch only the rows that run are computed; with a cache the
others get zero keys there, which nobody ever reads, so that the cache keeps its shape and beams can reorder it.

Shapes: B rows, S sequence, D width, N running rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.depth.config import APPROXIMATE, EXECUTE, REPEAT, SKIP
from moe_kit.depth.narrow import running_rows
from moe_kit.hf.cache import CacheView, CarriedDecisions, mark_empty, second_slot
from moe_kit.routing.state import ModelRouting

_CACHE_NAMES = ("past_key_values", "layer_past")
# arguments of decoder layers whose first dimension is the batch, or 1 for all rows
_ROW_ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings")


class Plan:
    """What to do with the rows of a batch at one unit.

    Args:
        actions: action of each row, on the host.
        device: where the rows' tensors are.
        forced: whether the user forced or replayed it.

    Attributes:
        uniform: the action of all rows, or None if they differ.
    """

    __slots__ = ("_rows", "actions", "device", "forced", "uniform")

    def __init__(self, actions: list[int], device: torch.device, forced: bool = False) -> None:
        self.actions, self.device, self.forced = actions, device, forced
        first = actions[0] if actions else EXECUTE
        self.uniform = first if actions.count(first) == len(actions) else None
        self._rows: dict[int, Tensor] | None = None

    @property
    def rows(self) -> dict[int, Tensor]:
        """Action -> int64 [N], the rows that take it; made on first use."""
        if self._rows is None:
            self._rows = {
                action: torch.tensor([row for row, taken in enumerate(self.actions) if taken == action]).to(self.device)
                for action in sorted(set(self.actions))
            }
        return self._rows


class Call:
    """A pending call of a module's own forward.

    Args:
        module: the routed module.
        forward: the forward of its own class, unbound.
        kwargs: its arguments besides the input.
        kind: "layer", "attention" or "mlp".
        slot: index of the layer's keys in a cache.
        routing: routing state of the model; routers of adapters inside the module read it.
    """

    __slots__ = ("cache", "cache_name", "forward", "kind", "kwargs", "module", "routing", "slot")

    def __init__(
        self, module: nn.Module, forward: Callable, kwargs: dict[str, Any], kind: str, slot: int, routing: ModelRouting
    ) -> None:
        self.module, self.forward, self.kwargs, self.kind = module, forward, kwargs, kind
        self.slot, self.routing = slot, routing
        self.cache_name, self.cache = "", None
        for name in _CACHE_NAMES:
            if kwargs.get(name) is not None:
                self.cache_name, self.cache = name, kwargs[name]

    def __call__(self, x: Tensor, **changes: Any) -> Any:
        """Call the module, some arguments replaced."""
        return (
            self.forward(self.module, x, **{**self.kwargs, **changes})
            if changes
            else self.forward(self.module, x, **self.kwargs)
        )

    def output(self, x: Tensor, **changes: Any) -> Tensor:
        """Call the module and return its first output."""
        out = self(x, **changes)
        return out[0] if isinstance(out, tuple) else out

    def identity(self, x: Tensor) -> Tensor:
        """What a skipped module returns: the stream of a layer, nothing of a sub-layer."""
        return x if self.kind == "layer" else torch.zeros_like(x)

    def stand_in(self, x: Tensor, forecaster: nn.Module) -> Tensor:
        """What an approximated module returns."""
        increment = forecaster(x)
        return x + increment if self.kind == "layer" else increment

    def wrap(self, out: Tensor) -> Any:
        """The module's form of a result: an attention returns its weights too, which a router does not have."""
        return (out, None) if self.kind == "attention" else out

    def with_cache(self, view: CacheView | None) -> dict[str, Any]:
        """Change of arguments that replaces the cache."""
        return {self.cache_name: view} if self.cache_name else {}


def run_rows(call: Call, x_BSD: Tensor, plan: Plan, carrier: CarriedDecisions, forecaster: nn.Module | None) -> Any:
    """Carry out a plan.

    Args:
        call: the module's own forward.
        x_BSD: float [B, S, D].
        plan: actions of the rows.
        carrier: decisions of the request; it knows the cache slots of second passes.
        forecaster: stand-in for approximated rows.

    Returns:
        What the module returns.
    """
    if plan.uniform is not None:
        return _uniform(call, x_BSD, plan.uniform, carrier, forecaster)
    out = call.identity(x_BSD)
    rows = plan.rows
    if APPROXIMATE in rows:
        assert forecaster is not None
        out = out.index_copy(0, rows[APPROXIMATE], call.stand_in(x_BSD[rows[APPROXIMATE]], forecaster))
    running = [rows[action] for action in (EXECUTE, REPEAT) if action in rows]
    if not running:
        _note_unused(call)
        return call.wrap(out)
    first_N = torch.cat(running).sort().values if len(running) > 1 else running[0]
    out = _pass(call, x_BSD, out, first_N, None)
    if REPEAT in rows:
        slot = None if call.cache is None else second_slot(call.cache, carrier, call.slot)
        out = _pass(call, out, out, rows[REPEAT], slot)
    return call.wrap(out)


def _uniform(call: Call, x_BSD: Tensor, action: int, carrier: CarriedDecisions, forecaster: nn.Module | None) -> Any:
    if action == EXECUTE:
        return call(x_BSD)
    if action == SKIP:
        _note_unused(call)
        return call.wrap(call.identity(x_BSD))
    if action == APPROXIMATE:
        assert forecaster is not None
        _note_unused(call)
        return call.wrap(call.stand_in(x_BSD, forecaster))
    out = call.output(x_BSD)
    if call.cache is None:
        return call(out)
    view = CacheView(call.cache, second_slot(call.cache, carrier, call.slot))
    return call(out, **call.with_cache(view))


def _pass(call: Call, x_BSD: Tensor, base_BSD: Tensor, rows_N: Tensor, slot: int | None) -> Tensor:
    """Run the module on some rows of x and put the result into the same rows of the base."""
    batch = x_BSD.shape[0]
    view = None if call.cache is None else CacheView(call.cache, slot, rows_N, batch)
    changes = select_rows(call.kwargs, rows_N, batch)
    if changes is None:
        # arguments that we cannot cut by rows: compute every row, keep those that run
        view = None if call.cache is None else CacheView(call.cache, slot)
        out = call.output(x_BSD, **call.with_cache(view))[rows_N]
    else:
        with running_rows(call.routing, rows_N, batch):
            out = call.output(x_BSD.index_select(0, rows_N), **{**changes, **call.with_cache(view)})
    return base_BSD.index_copy(0, rows_N, out.to(base_BSD.dtype))


def select_rows(kwargs: dict[str, Any], rows_N: Tensor, batch: int) -> dict[str, Any] | None:
    """The per-row arguments of a decoder layer, cut to some rows.

    Args:
        kwargs: arguments of the layer.
        rows_N: int64 [N].
        batch: B, more than 1.

    Returns:
        Changes of arguments; None if there is an argument whose rows are not known.
    """
    changes: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in _CACHE_NAMES or value is None or isinstance(value, (bool, int, float, str)):
            continue
        parts = value if isinstance(value, tuple) else (value,)
        known = name in _ROW_ARGUMENTS and all(isinstance(part, Tensor) for part in parts)
        if not known or any(part.shape[0] not in (1, batch) for part in parts):
            return None
        cut = tuple(part.index_select(0, rows_N) if part.shape[0] == batch else part for part in parts)
        changes[name] = cut if isinstance(value, tuple) else cut[0]
    return changes


def _note_unused(call: Call) -> None:
    """A skipped layer leaves its cache layer unused; see `mark_empty`."""
    if call.cache is None or call.kind == "mlp":
        return
    layers = getattr(call.cache, "layers", ())
    if call.slot < len(layers):
        mark_empty(layers[call.slot])
