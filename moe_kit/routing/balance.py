r"""Auxiliary losses that keep routers balanced and their logits small.

Each loss is computed for every site (router) on its own and averaged over the sites: pooling layers first lets
opposite imbalances of two layers cancel. Sites of equal shape are stacked and computed together. Padding never
counts. Losses are unscaled here; a coefficient multiplies them where they are added.

Shapes: G sites, N decisions, E experts, K slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_kit.routing.decision import Routing


@dataclass(frozen=True)
class RoutingStack:
    """Routings of equal shape, stacked.

    Attributes:
        logits_GNE: float32 [G, N, E].
        chosen_GNE: float32 [G, N, E], 1 where an expert is in use.
        weights_GNE: float32 [G, N, E], differentiable.
        real_N: float32 [N], 1 for real decisions, 0 for padding.
    """

    logits_GNE: Tensor
    chosen_GNE: Tensor
    weights_GNE: Tensor
    real_N: Tensor

    @property
    def count(self) -> Tensor:
        """Number of real decisions, at least 1."""
        return self.real_N.sum().clamp_min(1.0)

    def mean_over_decisions(self, value_GNE: Tensor) -> Tensor:
        """Mean over real decisions; [G, N, ...] -> [G, ...]."""
        real = self.real_N.view(1, -1, *([1] * (value_GNE.dim() - 2)))
        # where, not a product: padding may carry inf or NaN
        return torch.where(real > 0, value_GNE, 0.0).sum(1) / self.count


class BalanceLoss(Protocol):
    """A loss over stacked routings."""

    def __call__(self, stack: RoutingStack) -> Tensor:
        """Loss of each site, float32 [G]."""
        ...


@dataclass(frozen=True)
class SwitchLoss:
    """`E * sum_e f_e P_e`, f the share of assignments (no gradient), P the mean softmax probability.

    Its value is 1 at uniform routing for every top_k: f is normalised by the number of assignments. (transformers'
    own loss counts assignments per token and has the balanced value top_k, pooled over layers.)

    Source: Switch, arXiv 2101.03961, eq. 4.
    """

    def __call__(self, stack: RoutingStack) -> Tensor:
        """float32 [G], 1 when balanced, at most E."""
        assignments_GE = stack.mean_over_decisions(stack.chosen_GNE.detach())
        share_GE = assignments_GE / assignments_GE.sum(-1, keepdim=True).clamp_min(1e-9)
        probability_GE = stack.mean_over_decisions(stack.logits_GNE.softmax(-1))
        return stack.logits_GNE.shape[-1] * (share_GE * probability_GE).sum(-1)


@dataclass(frozen=True)
class ZLoss:
    """`mean logsumexp(logits)^2`: keeps logits small; it is numerical control, not balancing.

    Source: ST-MoE, arXiv 2202.08906.
    """

    def __call__(self, stack: RoutingStack) -> Tensor:
        """float32 [G], 0 or more."""
        return stack.mean_over_decisions(stack.logits_GNE.logsumexp(-1).square())


LOSSES: dict[str, BalanceLoss] = {"switch": SwitchLoss(), "z": ZLoss()}


def stack_routings(routings: Sequence[Routing]) -> list[RoutingStack]:
    """Stack routings of equal shape and mask.

    Args:
        routings: decisions with logits; those without (forced) are left out.

    Returns:
        One stack for each distinct shape and mask.
    """
    groups: dict[tuple, list[Routing]] = defaultdict(list)
    for routing in routings:
        if routing.logits_NE is not None:
            mask = None if routing.mask_N is None else routing.mask_N.data_ptr()
            slots = routing.expert_ids_NK.shape[1]
            groups[(*routing.logits_NE.shape, slots, routing.is_dense, mask, routing.logits_NE.device)].append(routing)
    return [_stack(group) for group in groups.values()]


def _stack(group: list[Routing]) -> RoutingStack:
    logits_GNE = torch.stack([routing.logits_NE for routing in group])
    first = group[0]
    if first.is_dense:
        chosen = torch.stack([routing.selected_NE for routing in group]).float()
        weights = torch.stack([routing.full_weights_NE for routing in group])
    else:
        ids_GNK = torch.stack([routing.sparse_ids_NK for routing in group])
        slots_GNK = torch.where(ids_GNK < 0, first.num_experts, ids_GNK)
        shape = (*ids_GNK.shape[:2], first.num_experts + 1)
        chosen = logits_GNE.new_zeros(shape).scatter(-1, slots_GNK, 1.0)[..., : first.num_experts]
        slot_weights = torch.stack([routing.sparse_weights_NK for routing in group])
        weights = slot_weights.new_zeros(shape).scatter_add(-1, slots_GNK, slot_weights)[..., : first.num_experts]
    real_N = logits_GNE.new_ones(logits_GNE.shape[1]) if first.mask_N is None else first.mask_N.float()
    return RoutingStack(logits_GNE, chosen, weights, real_N)


def mean_loss(loss: BalanceLoss, stacks: Sequence[RoutingStack]) -> Tensor:
    """Average of a loss over all sites of all stacks.

    Args:
        loss: the loss.
        stacks: at least one stack.

    Returns:
        Scalar, float32.
    """
    per_site = torch.cat([loss(stack) for stack in stacks])
    return per_site.mean()
