"""Deciding for single tokens; `sparse` carries it out.

A whole block a token (Mixture-of-Depths, arXiv 2404.02258) is its attention and its MLP obeying one decision.

Shapes: B rows, S sequence, T = B*S tokens, D width, A actions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from moe_kit.depth.config import APPROXIMATE, EXECUTE, LayerRoutingConfig
from moe_kit.depth.losses import Trace
from moe_kit.depth.routers import choose
from moe_kit.errors import RoutingError

if TYPE_CHECKING:
    from moe_kit.depth.unit import DepthUnit


@dataclass(frozen=True)
class TokenDecision:
    """What the tokens of a pass do at one unit.

    Attributes:
        action_T: int64 [T], action codes.
        gate_T: float32 [T], weight of executing; None = 1 where executed and 0 elsewhere.
        blend: compute both branches for every token and mix them by the gate (training with Gumbel noise).
        running: tokens that execute.
        approximated: tokens that are approximated.
        widest: tokens that execute in the row that has most of them.
        trace: where losses look, in training.
        batch: rows, B.
    """

    action_T: Tensor
    gate_T: Tensor | None
    blend: bool
    running: int
    approximated: int
    widest: int
    trace: Trace | None = None
    batch: int = 1


def decide_tokens(unit: DepthUnit, adapter: str, config: LayerRoutingConfig, x_BSD: Tensor) -> TokenDecision:
    """Decide for each token.

    Args:
        unit: the unit.
        adapter: its adapter.
        config: the adapter's configuration.
        x_BSD: float [B, S, D], the unit's input.

    Returns:
        The decision; registered for recording and, in training, for losses.

    Raises:
        RoutingError: if a forced decision does not fit.
    """
    batch, length, width = x_BSD.shape
    state, column = unit.state, unit.column
    learning = unit.learning(adapter)
    x_TD = x_BSD.reshape(-1, width)
    mask_T = state.routing.context.mask_T(batch, length)
    router = unit.moe_depth_router[adapter]
    forced_T = _forced(unit, adapter, column, batch, length)
    execute = config.action_codes.index(EXECUTE)
    logits_TA = predicted_TA = target_T = gate_T = None
    blend = False
    if forced_T is None or learning:
        logits_TA = router.scorer(x_TD)
    if learning and config.router == "capacity":
        predicted_TA = router.predict(x_TD)
        target_T = _top_tokens(logits_TA[:, execute], mask_T, batch, 1 - config.target_rate)
        action_T = torch.where(target_T, EXECUTE, _other(config))
        gate_T = logits_TA.softmax(-1)[:, execute]
    elif forced_T is None:
        action_T = choose(router.predict(x_TD) if config.router == "capacity" else logits_TA, config)
        if config.branch_scale != "none" or learning:
            gate_T = logits_TA.softmax(-1)[:, execute]
        if learning and config.train_mode == "gumbel":
            noisy_TA = functional.gumbel_softmax(logits_TA, tau=config.tau, hard=True)
            gate_T, blend = noisy_TA[:, execute], True
            action_T = torch.where(gate_T.detach() > 0.5, EXECUTE, _other(config))
    if forced_T is not None:
        action_T, gate_T, blend = forced_T.to(x_BSD.device), None, False
    trace = None
    if learning and logits_TA is not None:
        weight_T = logits_TA.softmax(-1)[:, execute] if gate_T is None else gate_T
        trace = Trace(
            column, logits_TA, weight_T, mask_T, router, None, target_T, predicted_TA, None, execute, unit.layer
        )
        if state.routing.context.is_open:
            state.present.traces.append(trace)
    run_T = action_T == EXECUTE
    # one read on the host: it is what lets a token really skip, and no later step has to wait for a count
    away_T = action_T == APPROXIMATE
    running_B = run_T.view(batch, length).sum(1)
    *counts, approximated = torch.cat([running_B, away_T.sum()[None]]).tolist()
    unit.register_tokens(adapter, action_T, mask_T)
    scaled = gate_T if blend or config.branch_scale != "none" else None
    if scaled is not None and config.branch_scale == "straight_through" and not blend:
        # value 1 on the branch that was taken, gradient of the gate
        scaled = scaled - scaled.detach() + run_T if learning else None
    return TokenDecision(action_T, scaled, blend, sum(counts), approximated, max(counts, default=0), trace, batch)


def _other(config: LayerRoutingConfig) -> int:
    return next(code for code in config.action_codes if code != EXECUTE)


def _forced(unit: DepthUnit, adapter: str, column: int, batch: int, length: int) -> Tensor | None:
    """Forced or replayed actions, int64 [T]."""
    replay = unit.state.routing.context.replay
    site = unit.site(adapter)
    if unit.state.forced is None and replay is not None and site in replay:
        ids_T = replay[site][:, 0]
        if ids_T.shape[0] != batch * length:
            raise RoutingError(
                f"the replayed record has {ids_T.shape[0]} tokens at {site}, the forward pass {batch * length}: "
                "replay on the same batch that was recorded."
            )
        return ids_T
    forced = unit.state.forced_column(adapter, column, site, batch)
    return None if forced is None else torch.tensor(forced).repeat_interleave(length)


def _top_tokens(score_T: Tensor, mask_T: Tensor | None, batch: int, share: float) -> Tensor:
    """The best ceil(share * n) of the n real tokens of each row, bool [T]."""
    score_BS = score_T.detach().view(batch, -1)
    mask_BS = torch.ones_like(score_BS, dtype=torch.bool) if mask_T is None else mask_T.view(batch, -1)
    score_BS = score_BS.masked_fill(~mask_BS, -math.inf)
    # the tolerance keeps 0.1 * 30 at 3 tokens; equal scores go to the earlier token
    count_B1 = torch.ceil(mask_BS.sum(1, keepdim=True) * share - 1e-6)
    order_BS = score_BS.sort(dim=1, descending=True, stable=True).indices
    rank_BS = torch.empty_like(order_BS).scatter_(
        1, order_BS, torch.arange(order_BS.shape[1], device=order_BS.device).expand_as(order_BS)
    )
    return ((rank_BS < count_B1) & mask_BS).view(-1)
