r"""Selections of a varying number of experts: top-p, positive scores, a learned threshold.

    top-p      fewest experts whose softmax sums to at least p
    positive   score > 0 (with a ReLU as weight: ReMoE)
    learned    softmax_e >= t(x), t(x) = sigmoid(w x + b) / E, weight (softmax_e - t)_+ renormalised (AdaMoLE)

Sources: ReMoE, arXiv 2412.14711; AdaMoLE, arXiv 2405.00361.

Shapes: N decisions, D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kit.errors import ConfigError
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.decision import Routing
from moe_kit.routing.frozen import assign, whole
from moe_kit.routing.scope import Decisions
from moe_kit.routing.select import Selection
from moe_kit.routing.step import StepState
from moe_kit.routing.weight import at_selection


class SelectTopP(nn.Module):
    """The fewest experts whose probabilities sum to at least p; the best one always.

    Args:
        p: in (0, 1].
    """

    def __init__(self, p: float = 0.8) -> None:
        super().__init__()
        if not 0 < p <= 1:
            raise ConfigError(f"p is {p}, expected a value in (0, 1].")
        self.p = p

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """Dense selection."""
        ordered, order = scores_NE.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # an expert is needed while those before it do not reach p
        needed = ordered.cumsum(-1) - ordered < self.p
        needed[:, 0] = True
        return Selection(selected_NE=torch.zeros_like(needed).scatter(-1, order, needed))


class SelectPositive(nn.Module):
    """Experts of positive score; possibly none."""

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """Dense selection."""
        return Selection(selected_NE=scores_NE > 0)


class SelectLearnedThreshold(nn.Module):
    """Experts whose probability reaches a threshold computed from the input; at least one, as t < 1/E.

    Args:
        width: D.
        num_experts: E.
    """

    # equal logits for all tokens do not make its choice constant
    reads_tokens = True

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def threshold_N1(self, decisions: Decisions) -> Tensor:
        """t(x), float32 [N, 1], in (0, 1/E).

        Raises:
            ConfigError: if the scope has no input for each decision.
        """
        if decisions.x_ND is None:
            raise ConfigError("a learned threshold needs an input for each decision: use scope 'token'.")
        with torch.autocast(decisions.x_ND.device.type, enabled=False):
            raw = F.linear(decisions.x_ND.float(), self.weight.float(), self.bias.float())
        return raw.sigmoid() / self.num_experts

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """Dense selection with its threshold."""
        threshold = self.threshold_N1(decisions)
        return Selection(selected_NE=scores_NE.softmax(-1) >= threshold, threshold_N1=threshold)

    def replayed(self, ids_NK: Tensor, scores_NE: Tensor, decisions: Decisions) -> Selection:
        """Given experts with the live threshold."""
        return Selection(ids_NK=ids_NK, threshold_N1=self.threshold_N1(decisions))


@dataclass(frozen=True)
class ExcessWeight:
    """`(softmax - t)_+` renormalised over the chosen."""

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """Weights that sum to 1, or to 0 where none exceeds the threshold."""
        if selection.threshold_N1 is None:
            raise ConfigError("weight 'excess' needs select 'learned_threshold', which computes the threshold.")
        excess = at_selection((logits_NE.softmax(-1) - selection.threshold_N1).relu(), selection)
        return excess / excess.sum(-1, keepdim=True).clamp_min(1e-12)


class SparsityController(StepState):
    r"""Moves the coefficient of ReMoE's sparsity loss until k of E experts are active on average.

        lambda <- lambda * step^sign((1 - k/E) - sparsity)

    One lambda for the whole model: sites are pooled.

    Args:
        num_experts: E.
        k: experts a token on average to settle at.
        initial: lambda at start.
        factor: `step` of the rule.
        loss: name of the controlled loss.

    Attributes:
        strength: float32 frozen parameter [1], lambda.

    Source: ReMoE, arXiv 2412.14711.
    """

    pooled = True
    strength: Tensor

    def __init__(
        self, num_experts: int, k: int, *, initial: float = 1e-8, factor: float = 1.2, loss: str = "relu_l1"
    ) -> None:
        super().__init__(3)
        self.num_experts, self.k, self.factor, self.loss = num_experts, k, factor, loss
        self.hold_frozen("strength", torch.tensor(initial))

    def pool_key(self) -> tuple:
        """Controllers of one loss and one rule share their counts."""
        return (*super().pool_key(), self.k, self.factor, self.loss)

    def loss_factor(self, name: str) -> Tensor | float:
        """Lambda for the controlled loss."""
        return whole(self.strength)[0] if name == self.loss else 1.0

    def measure(self, routing: Routing) -> Tensor:
        """Active slots, all slots, and the active slots aimed at."""
        load_E = routing.load_E()
        decisions = torch.full_like(load_E[0], float(routing.num_decisions))
        if routing.mask_N is not None:
            decisions = routing.mask_N.sum().to(load_E)
        return torch.stack([load_E.sum(), decisions * self.num_experts, decisions * self.k])

    def update(self, total: Tensor) -> None:
        """Multiply or divide lambda by the factor."""
        active, slots, wanted = total
        slots = slots.clamp_min(1)
        direction = torch.sign((1 - wanted / slots) - (1 - active / slots))
        strength = whole(self.strength)
        assign(self.strength, strength * (self.factor**direction).to(strength))
