"""Selections: which experts a decision uses.

Equal scores go to the expert of the lowest index: a stable sort promises that, `torch.topk` does not.

Shapes: N decisions, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_kit.errors import ConfigError
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.policy import plackett_luce_log_prob, plackett_luce_set_log_prob
from moe_kit.routing.scope import Decisions


@dataclass(frozen=True)
class Selection:
    """Chosen experts, sparse (`ids_NK`) or dense (`selected_NE`).

    Attributes:
        ids_NK: int64 [N, K], -1 for an empty slot.
        selected_NE: bool [N, E].
        log_prob_N: float32 [N], if the choice was sampled.
        threshold_N1: float32 [N, 1], subtracted from the scores by a threshold selection.
    """

    ids_NK: Tensor | None = None
    selected_NE: Tensor | None = None
    log_prob_N: Tensor | None = None
    threshold_N1: Tensor | None = None


def stable_top_k(scores_NE: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, best first; ties go to the lowest index.

    Args:
        scores_NE: float [N, E].
        k: number of experts, at most E.

    Returns:
        int64 [N, k].
    """
    return scores_NE.sort(dim=-1, descending=True, stable=True).indices[..., :k]


class SelectAll(nn.Module):
    """Every expert, always."""

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """All experts as a dense selection."""
        return Selection(selected_NE=torch.ones_like(scores_NE, dtype=torch.bool))


class SelectTopK(nn.Module):
    """The k experts of the highest score.

    Args:
        k: number of experts.
        absolute: compare magnitudes instead of signed scores.
        num_groups: experts lie in this many equal groups; 1 = no groups.
        groups_kept: groups kept; a group is worth the sum of its two best scores.

    Source: group limit, DeepSeek-V3, arXiv 2412.19437 (dropped groups are masked with -inf, never with 0).
    """

    def __init__(self, k: int, *, absolute: bool = False, num_groups: int = 1, groups_kept: int = 1) -> None:
        super().__init__()
        if not 1 <= groups_kept <= num_groups:
            raise ConfigError(f"groups_kept is {groups_kept}, expected 1 to num_groups = {num_groups}.")
        self.k, self.absolute, self.num_groups, self.groups_kept = k, absolute, num_groups, groups_kept

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """Sparse selection, best first."""
        scores_NE = scores_NE.abs() if self.absolute else scores_NE
        if self.num_groups > 1:
            grouped = scores_NE.unflatten(-1, (self.num_groups, -1))
            worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, stable_top_k(worth, self.groups_kept), True)
            scores_NE = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
        return Selection(ids_NK=stable_top_k(scores_NE, self.k))


class SelectSampleK(nn.Module):
    """Samples k experts without replacement in training, takes the k best in evaluation.

    Gumbel noise on the logits and a sort draw from the Plackett-Luce law exactly, in one pass.

    Args:
        k: number of experts.
        unordered: report the log-probability of the set instead of the order (k <= 4, lower variance).

    Source: ReMix, arXiv 2603.10160, sections 2.2 and 3.2.
    """

    def __init__(self, k: int, *, unordered: bool = False) -> None:
        super().__init__()
        self.k, self.unordered = k, unordered

    def log_prob(self, scores_NE: Tensor, ids_NK: Tensor) -> Tensor:
        """Log-probability of `ids_NK` under `scores_NE`; float32 [N]."""
        rule = plackett_luce_set_log_prob if self.unordered else plackett_luce_log_prob
        return rule(scores_NE, ids_NK)

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """Sparse selection in the order drawn, with its log-probability in training."""
        if not self.training:
            return Selection(ids_NK=stable_top_k(scores_NE, self.k))
        uniform = torch.rand_like(scores_NE).clamp_(1e-20, 1 - 1e-7)
        gumbel = -(-uniform.log()).log()
        ids_NK = stable_top_k(scores_NE.detach() + gumbel, self.k)
        return Selection(ids_NK=ids_NK, log_prob_N=self.log_prob(scores_NE, ids_NK))
