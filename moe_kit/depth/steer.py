"""Steering layer routers from outside: forced actions, counts of what ran, and the compute knob.

Shapes: B batch rows, L decoder layers, U units (L layers, or 2L: attention and MLP of each layer in turn).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_kit.depth.config import APPROXIMATE, EXECUTE, REPEAT, SKIP, check_budget
from moe_kit.depth.route import UNDECIDED
from moe_kit.depth.routers import FixedRouter, fixed_layers
from moe_kit.depth.state import DepthState, find_depth_state
from moe_kit.errors import ConfigError, RoutingError


@contextmanager
def force_layers(model: nn.Module, actions: Tensor | Sequence[Sequence[int]]) -> Iterator[None]:
    """Force what happens at every unit, whatever the routers say.

    Args:
        model: a model with layer routers, wrapped or native.
        actions: int [B or 1, U]: 0 skip, 1 execute, 2 repeat, 3 approximate; units in execution order (layers, or
            attention and MLP of each layer in turn where sub-layers are routed), unrouted ones included with 1.
            A batch that is a multiple of B repeats each row, for beams. In token scope all tokens of a row obey.

    Raises:
        RoutingError: if the shape is that of another model, a value is no action, an unrouted unit is to do anything
            but execute, a unit is to repeat that cannot, or to approximate without a forecaster. At the forward pass,
            if the rows do not fit the batch or the cache was filled with other routes.

    Example:
        `with force_layers(model, [[1, 0, 1, 2]]): model.generate(**batch)`
    """
    state = find_depth_state(model)
    adapter = state.active()
    # a copy: it is told apart by identity, and the caller may write to theirs
    table = torch.as_tensor(actions, dtype=torch.long).cpu().clone()
    columns, units = state.num_columns(adapter), state.units[adapter]
    if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] != columns:
        what = "layers" if columns == state.num_layers else "units (attention and MLP of each layer)"
        raise RoutingError(
            f"actions has shape {list(table.shape)}, expected [rows, {columns}]: this model has {columns} {what}."
        )
    if bool(((table < SKIP) | (table > APPROXIMATE)).any()):
        raise RoutingError(
            f"actions holds {sorted(set(table.flatten().tolist()))}, expected 0 skip, 1 execute, 2 repeat, 3 approximate."
        )
    unrouted = [
        column for column in range(columns) if column not in units and bool((table[:, column] != EXECUTE).any())
    ]
    if unrouted:
        raise RoutingError(
            f"units {unrouted} are not routed and can only execute (action 1); routed are {sorted(units)}. "
            "Name them in the config's `layers` to route them."
        )
    config = state.configs[adapter]
    if bool((table == REPEAT).any()) and (config.units != "layer" or config.scope != "sequence"):
        raise RoutingError(
            "action 2 (repeat) needs units='layer' and scope='sequence'; these routers have other units."
        )
    if bool((table == APPROXIMATE).any()) and not config.forecaster_hidden:
        raise RoutingError("action 3 (approximate) needs a forecaster: set forecaster_hidden in the config.")
    previous, state.forced = state.forced, table
    try:
        yield
    finally:
        state.forced = previous


def layer_applications(model: nn.Module) -> Tensor:
    """How often each layer was applied for each row, in the last forward or generated request.

    Args:
        model: a model with layer routers.

    Returns:
        [B, L]. int64 counts where layers are routed per sequence: 0 skipped or approximated, 1, or 2 repeated. float32
        where sub-layers (each counts one half) or tokens (mean over the real tokens of the last pass) are routed.

    Raises:
        RoutingError: before any forward pass.
    """
    state = find_depth_state(model)
    adapter = state.active()
    config = state.configs[adapter]
    if config.scope == "token":
        table = _token_shares(state, adapter)
    else:
        decided_BU = state.decided(adapter)
        if decided_BU is None:
            raise RoutingError("no request has been routed yet: run a forward pass first.")
        table = torch.where(decided_BU == REPEAT, 2, torch.where(decided_BU == UNDECIDED, 1, decided_BU % 3 % 2))
    if config.units == "layer":
        return table
    return table.float().view(table.shape[0], state.num_layers, 2).mean(-1)


def _token_shares(state: DepthState, adapter: str) -> Tensor:
    if not state.present.decisions:
        raise RoutingError("no request has been routed yet: run a forward pass first.")
    mask_BS = state.routing.context.mask_BS
    first = next(iter(state.present.decisions.values()))
    any_T, batch = first.action_T, first.batch
    mask_BS = torch.ones(batch, any_T.shape[0] // batch, device=any_T.device) if mask_BS is None else mask_BS
    table = torch.ones(batch, state.num_columns(adapter))
    for column, decision in state.present.decisions.items():
        run_BS = (decision.action_T == EXECUTE).view(batch, -1).float()
        table[:, column] = ((run_BS * mask_BS).sum(1) / mask_BS.sum(1).clamp_min(1)).cpu()
    return table


def set_budget(model: nn.Module, budget: float) -> None:
    """Move the compute knob of the active layer routers, without training.

    Args:
        model: a model with layer routers.
        budget: by the config's `budget_kind`. interpolation: p in [-1, 1], towards skipping below 0 and repeating
            above, 0 leaves the router alone. threshold: a unit executes iff P(execute) >= p in [0, 1]. rate: share of
            the routed units to skip, in [0, 1] (static and random routers); static routers skip the first of
            `skip_order`, or evenly spaced layers without one.

    Raises:
        ConfigError: if the budget is outside its range, or a static router has its layers named (`skip_layers`) and
            the budget asks for more or fewer.
        RoutingError: if the model has no active layer routers.
    """
    state = find_depth_state(model)
    adapter = state.active()
    config = state.configs[adapter]
    check_budget(config.budget_kind, budget)
    units = state.units[adapter]
    layers = sorted({unit.layer for unit in units.values()})
    named = config.skip_layers
    if config.router == "fixed" and named is not None and round(budget * len(layers)) != len(named):
        raise ConfigError(
            f"budget {budget:g} asks this static router to skip {round(budget * len(layers))} of {len(layers)} layers, but "
            f"skip_layers names {named}, in no order: give `skip_order` (least important first, as the phase "
            "`importance` measures it), or neither for evenly spaced layers."
        )
    config.budget = float(budget)
    if config.router == "fixed":
        skipped = fixed_layers(config, layers)
        for unit in units.values():
            router = unit.moe_depth_router[adapter]
            assert isinstance(router, FixedRouter)
            router.action.fill_(SKIP if unit.layer in skipped else EXECUTE)
