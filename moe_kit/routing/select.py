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
        threshold_N1: float32 [N, 1], subtracted from the probabilities by a learned threshold.
        is_full: every slot of `ids_NK` holds an expert.
        considered_NK: int64 [N, K], the choices before some were dropped; weights are normalised over these.
        scores_NE: float32 [N, E], logits with the noise of this choice, for weights that must see the same noise.
    """

    ids_NK: Tensor | None = None
    selected_NE: Tensor | None = None
    log_prob_N: Tensor | None = None
    threshold_N1: Tensor | None = None
    considered_NK: Tensor | None = None
    scores_NE: Tensor | None = None
    is_full: bool = False

    def chosen_NE(self, num_experts: int) -> Tensor:
        """bool [N, E], the chosen experts of either form.

        Args:
            num_experts: E.
        """
        if self.ids_NK is None:
            assert self.selected_NE is not None
            return self.selected_NE
        slots_NK = torch.where(self.ids_NK < 0, num_experts, self.ids_NK)
        chosen = torch.zeros(self.ids_NK.shape[0], num_experts + 1, dtype=torch.bool, device=self.ids_NK.device)
        return chosen.scatter(1, slots_NK, True)[:, :num_experts]


def gumbel_like(scores: Tensor) -> Tensor:
    """Standard Gumbel noise from torch's default generator, finite."""
    uniform = torch.rand_like(scores).clamp_(1e-20, 1 - 1e-7)
    return -(-uniform.log()).log()


def stable_top_k(scores_NE: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, best first; ties go to the lowest index.

    Args:
        scores_NE: float [N, E].
        k: number of experts, at most E.

    Returns:
        int64 [N, k].
    """
    if scores_NE.dim() != 2:
        return scores_NE.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    from moe_kit_kernels.topk_gate.cpu import stable_topk

    return stable_topk(scores_NE, k)


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
        gumbel: add Gumbel noise in training; weights see the same noise (straight-through Gumbel).

    Raises:
        ConfigError: if more groups are kept than there are; in `check`, if the kept ones hold fewer than k experts.

    Source: group limit, DeepSeek-V3, arXiv 2412.19437 (dropped groups are masked with -inf, never with 0).
    """

    def __init__(
        self, k: int, *, absolute: bool = False, num_groups: int = 1, groups_kept: int = 1, gumbel: bool = False
    ) -> None:
        super().__init__()
        if not 1 <= groups_kept <= num_groups:
            raise ConfigError(f"groups_kept is {groups_kept}, expected 1 to num_groups = {num_groups}.")
        self.k, self.absolute, self.num_groups, self.groups_kept = k, absolute, num_groups, groups_kept
        self.gumbel = gumbel

    def check(self, num_experts: int) -> None:
        """Refuse groups that do not divide the experts, or that leave fewer than k to choose from.

        Args:
            num_experts: E.

        Raises:
            ConfigError: saying how many experts the kept groups hold.
        """
        if self.num_groups == 1:
            return
        if num_experts % self.num_groups:
            raise ConfigError(f"{num_experts} experts do not fall into {self.num_groups} equal groups.")
        left = self.groups_kept * num_experts // self.num_groups
        if self.k > left:
            raise ConfigError(
                f"top_k is {self.k}, but {self.groups_kept} of {self.num_groups} groups hold {left} of {num_experts} experts: "
                "raise groups_kept, or lower top_k or num_groups."
            )

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """Sparse selection, best first."""
        noisy_NE = scores_NE + gumbel_like(scores_NE) if self.gumbel and self.training else None
        scores_NE = scores_NE if noisy_NE is None else noisy_NE.detach()
        scores_NE = scores_NE.abs() if self.absolute else scores_NE
        if self.num_groups > 1:
            self.check(scores_NE.shape[-1])
            grouped = scores_NE.unflatten(-1, (self.num_groups, -1))
            worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, stable_top_k(worth, self.groups_kept), True)
            scores_NE = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
        return Selection(ids_NK=stable_top_k(scores_NE, self.k), scores_NE=noisy_NE, is_full=True)

    def replayed(self, ids_NK: Tensor, scores_NE: Tensor, decisions: Decisions) -> Selection:
        """Given experts; Gumbel noise is drawn as if they had been chosen here."""
        noisy = scores_NE + gumbel_like(scores_NE) if self.gumbel and self.training else None
        return Selection(ids_NK=ids_NK, scores_NE=noisy)


def is_plain_top_k(select: nn.Module) -> bool:
    """Whether the choice is the k highest scores and nothing else.

    Args:
        select: a selection.
    """
    return type(select) is SelectTopK and not (select.absolute or select.gumbel) and select.num_groups == 1


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
        ids_NK = stable_top_k(scores_NE.detach() + gumbel_like(scores_NE), self.k)
        return Selection(ids_NK=ids_NK, log_prob_N=self.log_prob(scores_NE, ids_NK))
