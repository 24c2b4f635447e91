r"""Auxiliary losses that keep routers balanced and their logits small.

Each loss is computed for every site (router) on its own and averaged over the sites: pooling layers first lets
opposite imbalances of two layers cancel. Sites of equal shape are stacked and computed together. Padding never
counts. Losses are unscaled here; a coefficient multiplies them where they are added.

Shapes: G sites, N decisions, E experts, K slots.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_kit.errors import ConfigError
from moe_kit.routing.decision import Routing


@dataclass(frozen=True)
class RoutingStack:
    """Routings of equal shape, stacked.

    Attributes:
        logits_GNE: float32 [G, N, E].
        chosen_GNE: float32 [G, N, E], 1 where an expert is in use.
        weights_GNE: float32 [G, N, E], differentiable.
        real_N: float32 [N], 1 for real decisions, 0 for padding.
        chance_GNE: float32 [G, N, E], probability of being chosen under the router's own noise; None without noise.
        sequence_N: int64 [N], sequence of each decision; None = the decision's own index.
        num_sequences: number of sequences; None = N.
        task_types: 0 or 1 for each sequence, or one for all, as `routing_inputs` got it; None = not given.
    """

    logits_GNE: Tensor
    chosen_GNE: Tensor
    weights_GNE: Tensor
    real_N: Tensor
    chance_GNE: Tensor | None = None
    sequence_N: Tensor | None = None
    num_sequences: int | None = None
    task_types: Any = None

    @property
    def count(self) -> Tensor:
        """Number of real decisions, at least 1."""
        return self.real_N.sum().clamp_min(1.0)

    def mean_over_decisions(self, value_GNE: Tensor) -> Tensor:
        """Mean over real decisions; [G, N, ...] -> [G, ...]."""
        real = self.real_N.view(1, -1, *([1] * (value_GNE.dim() - 2)))
        # where, not a product: padding may carry inf or NaN
        return torch.where(real > 0, value_GNE, 0.0).sum(1) / self.count

    def total(self, local: Tensor) -> Tensor:
        """A sum over this batch, seen as a sum over the batch that is balanced (see `joined`)."""
        return local


class BalanceLoss(Protocol):
    """A loss over stacked routings."""

    def __call__(self, stack: RoutingStack) -> Tensor:
        """Loss of each site, float32 [G]."""
        ...


@dataclass(frozen=True)
class SwitchLoss:
    """`E * sum_e f_e P_e`, f the share of assignments (no gradient), P the mean softmax probability.

    Attributes:
        on_weights: P is the mean weight instead, for methods whose weights are no plain softmax (AdaMoLE).

    Its value is 1 at uniform routing for every top_k: f is normalised by the number of assignments. (transformers'
    own loss counts assignments per token and has the balanced value top_k, pooled over layers.)

    Source: Switch, arXiv 2101.03961, eq. 4.
    """

    on_weights: bool = False

    def __call__(self, stack: RoutingStack) -> Tensor:
        """float32 [G], 1 when balanced, at most E."""
        assignments_GE = stack.mean_over_decisions(stack.chosen_GNE.detach())
        share_GE = assignments_GE / assignments_GE.sum(-1, keepdim=True).clamp_min(1e-9)
        each_GNE = stack.weights_GNE if self.on_weights else stack.logits_GNE.softmax(-1)
        probability_GE = stack.mean_over_decisions(each_GNE)
        return stack.logits_GNE.shape[-1] * (share_GE * probability_GE).sum(-1)


@dataclass(frozen=True)
class ZLoss:
    """`mean logsumexp(logits)^2`: keeps logits small; it is numerical control, not balancing.

    Source: ST-MoE, arXiv 2202.08906.
    """

    def __call__(self, stack: RoutingStack) -> Tensor:
        """float32 [G], 0 or more."""
        return stack.mean_over_decisions(stack.logits_GNE.logsumexp(-1).square())


@dataclass(frozen=True)
class GShardLoss:
    """`1/E sum_e c_e m_e`, c the share of first choices (no gradient), m the mean softmax probability.

    Its value is 1/E^2 when balanced.

    Source: GShard, arXiv 2006.16668.
    """

    def __call__(self, stack: RoutingStack) -> Tensor:
        """float32 [G]."""
        experts = stack.logits_GNE.shape[-1]
        # argmax does not promise the first of equal scores; a stable sort does
        first_GN1 = stack.logits_GNE.detach().sort(dim=-1, descending=True, stable=True).indices[..., :1]
        firsts = torch.zeros_like(stack.logits_GNE).scatter(-1, first_GN1, 1.0)
        share_GE = stack.mean_over_decisions(firsts)
        return (share_GE * stack.mean_over_decisions(stack.logits_GNE.softmax(-1))).sum(-1) / experts


@dataclass(frozen=True)
class CVLoss:
    """Squared coefficient of variation over experts: `variance / mean^2` of the importance or of the smooth load.

    Attributes:
        of: "importance" sums the weights, "load" the probabilities of being chosen under the router's own noise
            (score "noisy_linear"); counts alone have no gradient.

    Source: arXiv 1701.06538; LoRAMoE uses the importance form, arXiv 2312.09979.
    """

    of: str = "importance"

    def __call__(self, stack: RoutingStack) -> Tensor:
        """float32 [G], 0 when balanced."""
        if self.of == "load" and stack.chance_GNE is None:
            raise ConfigError("the loss 'cv_load' needs a router with noise of its own: score='noisy_linear'.")
        value = stack.weights_GNE if self.of == "importance" else stack.chance_GNE
        assert value is not None
        mean_GE = stack.mean_over_decisions(value)
        return mean_GE.var(-1, unbiased=False) / (mean_GE.mean(-1).square() + 1e-10)


@dataclass(frozen=True)
class EntropyLoss:
    """Entropy of the softmax over ln E, with its sign in the name.

    Attributes:
        of: "token" averages the entropy of each decision, "mean" takes the entropy of the mean probability.
        sign: +1 minimises the entropy, -1 maximises it. LoRA-Mixer prints its token term with -1, which flattens
            each decision, where its text wants peaked ones.

    Source: LoRA-Mixer, arXiv 2507.00029; two-stage use: see `moe_kit.routing.schedule`.
    """

    of: str
    sign: int

    def __call__(self, stack: RoutingStack) -> Tensor:
        """float32 [G], in [0, 1] times the sign."""
        return self.sign * normalised_entropy(stack, self.of)


def normalised_entropy(stack: RoutingStack, of: str) -> Tensor:
    """Entropy over ln E of each decision's softmax ("token") or of its mean ("mean").

    Returns:
        float32 [G], in [0, 1]; 0 for a single expert.
    """
    log_p = stack.logits_GNE.log_softmax(-1)
    scale = math.log(max(log_p.shape[-1], 2))
    if of == "token":
        return stack.mean_over_decisions(-(log_p.exp() * log_p).sum(-1)) / scale
    mean_GE = stack.mean_over_decisions(log_p.exp())
    return -(mean_GE * mean_GE.clamp_min(1e-20).log()).sum(-1) / scale


@dataclass(frozen=True)
class ReLUSparsityLoss:
    """ReMoE's load-weighted L1: `mean over tokens of sum_e f_e g_e`, `f_e = E/k share of tokens with g_e > 0`.

    Attributes:
        k: experts a token on average; scales f so that it is 1 when balanced at k.

    Source: ReMoE, arXiv 2412.14711.
    """

    k: int

    def __call__(self, stack: RoutingStack) -> Tensor:
        """float32 [G], 0 or more."""
        share_GE = stack.mean_over_decisions(stack.chosen_GNE.detach())
        gates_GE = stack.mean_over_decisions(stack.weights_GNE)
        return (share_GE * gates_GE).sum(-1) * (stack.logits_GNE.shape[-1] / self.k)


LOSSES: dict[str, BalanceLoss] = {
    "switch": SwitchLoss(),
    "switch_weights": SwitchLoss(on_weights=True),
    "gshard": GShardLoss(),
    "cv_importance": CVLoss("importance"),
    "cv_load": CVLoss("load"),
    "minimise_token_entropy": EntropyLoss("token", 1),
    "maximise_token_entropy": EntropyLoss("token", -1),
    "maximise_mean_entropy": EntropyLoss("mean", -1),
    "z": ZLoss(),
}
"""Losses by the name used in a configuration; `relu_l1` is built with its k, `cv_typed` is in `typed_balance`."""


def stack_routings(routings: Sequence[Routing], task_types: Any = None) -> list[RoutingStack]:
    """Stack routings of equal shape and mask.

    Args:
        routings: decisions with logits; those without (forced) are left out.
        task_types: for `typed_balance.TypedCVLoss`.

    Returns:
        One stack for each distinct shape and mask.
    """
    groups: dict[tuple, list[Routing]] = defaultdict(list)
    for routing in routings:
        if routing.logits_NE is not None:
            mask = None if routing.mask_N is None else routing.mask_N.data_ptr()
            slots = routing.expert_ids_NK.shape[1]
            noisy = routing.chance_NE is not None
            groups[(*routing.logits_NE.shape, slots, routing.is_dense, noisy, mask, routing.logits_NE.device)].append(
                routing
            )
    return [_stack(group, task_types) for group in groups.values()]


def _stack(group: list[Routing], task_types: Any) -> RoutingStack:
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
    chance = None if first.chance_NE is None else torch.stack([routing.chance_NE for routing in group])
    return RoutingStack(logits_GNE, chosen, weights, real_N, chance, first.sequence_N, first.num_sequences, task_types)


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
