"""Deciding for whole sequences: read the request's route, or score the prompt once and write it.

Shapes: B rows, S sequence, D width, A actions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_kit.depth.config import APPROXIMATE, EXECUTE, SKIP, LayerRoutingConfig
from moe_kit.depth.execute import Call, Plan
from moe_kit.depth.losses import Trace
from moe_kit.depth.route import Route
from moe_kit.depth.routers import ActionRouter, FixedRouter, choose_rows, pooled_logits
from moe_kit.errors import RoutingError

if TYPE_CHECKING:
    from moe_kit.depth.unit import DepthUnit


def decide_rows(
    unit: DepthUnit, adapter: str, call: Call, x_BSD: Tensor, route: Route, learning: bool
) -> tuple[Plan, Tensor | None]:
    """Decide for each row, or read what was decided.

    Args:
        unit: the unit.
        adapter: its adapter.
        call: the module's own forward.
        x_BSD: float [B, S, D], the unit's input.
        route: decisions of the request; a new one is written to it.
        learning: the router is being trained.

    Returns:
        The plan, and float32 [B], the weight of executing, where training mixes both branches instead of choosing.

    Raises:
        RoutingError: if the decision cannot be obeyed exactly.
    """
    state, config, router = unit.state, unit.configs[adapter], unit.moe_depth_router[adapter]
    batch, column = x_BSD.shape[0], unit.column
    actions, before = route.known(column), route.plans.get(column)
    forced = None
    if actions is None:
        forced = state.forced_column(adapter, column, unit.site(adapter), batch)
    logits_BA = None
    if isinstance(router, ActionRouter) and (learning or (forced is None and actions is None)):
        logits_BA = _logits(unit, config, router, x_BSD)
    if actions is None:
        actions = _choose(unit, adapter, logits_BA, route, learning) if forced is None else forced
        if state.present.foreign and actions.count(EXECUTE) < batch:
            raise RoutingError(
                f"{unit.path}: the cache holds tokens that were computed without these routes, so {actions} "
                "cannot be obeyed: fill a fresh cache with the layer router active."
            )
        route.decide(column, actions)
        state.present.decided_now = True
    _check(unit, adapter, call, actions)
    # recomputation finds the decision made, and must mix where the first run did
    was_forced = forced is not None if before is None else before.forced
    plan = route.plans[column] = Plan(actions, x_BSD.device, was_forced)
    gate_B = None
    if learning and logits_BA is not None:
        soft_B = _trace(unit, config, router, logits_BA, actions)
        gate_B = soft_B if config.train_mode == "soft" and not was_forced else None
    return plan, gate_B


def _logits(unit: DepthUnit, config: LayerRoutingConfig, router: ActionRouter, x_BSD: Tensor) -> Tensor:
    batch, length, _ = x_BSD.shape
    mask_BS, windows = unit.state.pooling(config, batch, length, x_BSD.device)
    return pooled_logits(router, x_BSD, mask_BS, config.pooling, windows)


def _choose(unit: DepthUnit, adapter: str, logits_BA: Tensor | None, route: Route, learning: bool) -> list[int]:
    """Action of each row: the one place where a host waits for the device, once a layer at prefill."""
    config, router = unit.configs[adapter], unit.moe_depth_router[adapter]
    if config.router == "random":
        return unit.state.random_actions(adapter, route)[unit.column]
    if isinstance(router, FixedRouter):
        return [int(router.action)] * route.batch
    assert logits_BA is not None
    if learning and config.train_mode == "sample":
        index_B = torch.multinomial(logits_BA.detach().softmax(-1), 1)[:, 0]
        return [config.action_codes[index] for index in index_B.tolist()]
    return choose_rows(logits_BA.tolist(), config)


def _trace(
    unit: DepthUnit, config: LayerRoutingConfig, router: nn.Module, logits_BA: Tensor, actions: list[int]
) -> Tensor:
    """Note the decision for losses; returns the probability of executing, float32 [B]."""
    codes = config.action_codes
    execute = codes.index(EXECUTE)
    soft_B = logits_BA.softmax(-1)[:, execute]
    # a forced action that the router does not know counts as its first
    index_B = torch.tensor([codes.index(action) if action in codes else 0 for action in actions])
    trace = Trace(
        column=unit.column,
        logits_NA=logits_BA,
        gate_N=soft_B,
        mask_N=None,
        router=router,
        log_prob_N=logits_BA.log_softmax(-1).gather(-1, index_B.to(logits_BA.device)[:, None])[:, 0],
        execute=execute,
        layer=unit.layer,
    )
    if unit.state.routing.context.is_open:
        unit.state.present.traces.append(trace)
    return soft_B


def _check(unit: DepthUnit, adapter: str, call: Call, actions: list[int]) -> None:
    """Refuse what cannot be exact.

    Raises:
        RoutingError: a skip that would leave the cache that sizes the masks empty; no forecaster to approximate.
    """
    if APPROXIMATE in actions and unit.forecaster(adapter) is None:
        raise RoutingError(
            f"{unit.path}: action 3 (approximate) needs a forecaster, but forecaster_hidden is not set in the config."
        )
    if call.cache is None or unit.kind == "mlp" or unit.layer not in unit.state.anchors:
        return
    if actions.count(SKIP) + actions.count(APPROXIMATE) == len(actions):
        raise RoutingError(
            f"{unit.path} is the first layer of its attention kind: transformers sizes the masks and positions of "
            "all layers from its cache, which a skip would leave empty. Leave this layer unrouted (the default), "
            "or run without a cache."
        )
