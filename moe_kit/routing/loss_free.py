r"""Loss-free balance: a bias per expert that shifts the choice and never the weight.

    choice score = gate(logit) + b_e

    sign rule      b_e <- b_e + u sign(mean count - count_e)
    quantile rule  b_e <- -quantile_{1 - k/E} over tokens of (s_te - alpha_t), then minus the mean over experts,
                   alpha_t the (k+1)-th largest s_te + b_e of token t

Both descend the dual of the balanced assignment problem: the first by sign gradient steps of size u, the second by
exact coordinate descent, without a step size. Counts of a step act on the next one only; the present one would leak.

Sources: sign rule, arXiv 2408.15664 and DeepSeek-V3, arXiv 2412.19437; quantile rule, arXiv 2607.24653.

Shapes: N decisions, E experts, K chosen.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe_kit.errors import ConfigError
from moe_kit.routing.decision import Routing
from moe_kit.routing.frozen import assign, whole
from moe_kit.routing.select import stable_top_k
from moe_kit.routing.step import StepState

Gate = Literal["none", "sigmoid", "softmax"]


def gate_scores(logits_NE: Tensor, gate: str) -> Tensor:
    """Logits in the space where experts are compared.

    Args:
        logits_NE: float32 [N, E].
        gate: "none" (or "logits"), "sigmoid" or "softmax".

    Returns:
        float32 [N, E].

    Raises:
        ConfigError: if `gate` is none of these.
    """
    if gate in ("none", "logits"):
        return logits_NE
    if gate == "sigmoid":
        return logits_NE.sigmoid()
    if gate == "softmax":
        return logits_NE.softmax(-1)
    raise ConfigError(f"gate is {gate!r}, expected none, sigmoid or softmax.")


class LossFreeBias(StepState):
    """Bias on the choice, moved towards equal loads.

    Args:
        num_experts: E.
        rate: u of the sign rule.
        gate: space in which the bias is added.
        rule: "sign" or "quantile".
        bins: histogram bins of the quantile rule; one integer all-reduce of E * bins a step.
        span: the histogram covers [-span, span]; values outside count in the outer bins. 2 fits gates in [0, 1];
            choose it a few times the logits' spread for gate "none".

    Attributes:
        bias: float32 frozen parameter [E], zero at start.
    """

    bias: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        rate: float = 1e-3,
        gate: Gate = "sigmoid",
        rule: Literal["sign", "quantile"] = "sign",
        bins: int = 1000,
        span: float = 2.0,
    ) -> None:
        if rule not in ("sign", "quantile"):
            raise ConfigError(f"rule is {rule!r}, expected 'sign' or 'quantile'.")
        gate_scores(torch.zeros(1, 1), gate)
        super().__init__(num_experts if rule == "sign" else num_experts * (bins + 1))
        self.num_experts, self.rate, self.gate, self.rule = num_experts, rate, gate, rule
        self.bins, self.span = bins, span
        self.hold_frozen("bias", torch.zeros(num_experts))

    def choice_scores(self, logits_NE: Tensor) -> Tensor:
        """Gate plus bias, float32 [N, E]."""
        return gate_scores(logits_NE, self.gate) + self.bias

    def measure(self, routing: Routing) -> Tensor:
        """Loads for the sign rule; for the quantile rule a histogram of s - alpha and the loads."""
        load_E = routing.load_E()
        slots = routing.expert_ids_NK.shape[1]
        if self.rule == "sign":
            return load_E
        if routing.logits_NE is None or slots >= self.num_experts:
            return load_E.new_zeros(self.size)
        gated_NE = gate_scores(routing.logits_NE, self.gate)
        biased_NE = gated_NE + self.bias
        alpha_N1 = biased_NE.gather(-1, stable_top_k(biased_NE, slots + 1)[:, -1:])
        position = (gated_NE - alpha_N1 + self.span) * (self.bins / (2 * self.span))
        bin_NE = (
            position.long().clamp(0, self.bins - 1) + torch.arange(self.num_experts, device=position.device) * self.bins
        )
        real_NE = torch.ones_like(gated_NE) if routing.mask_N is None else routing.mask_N[:, None].expand_as(gated_NE)
        histogram = load_E.new_zeros(self.num_experts * self.bins)
        histogram.scatter_add_(0, bin_NE.reshape(-1), real_NE.reshape(-1).to(histogram))
        return torch.cat([histogram, load_E])

    def update(self, total: Tensor) -> None:
        """One step of the rule."""
        load_E, bias_E = total[-self.num_experts :], whole(self.bias)
        if self.rule == "sign":
            assign(self.bias, bias_E + self.rate * (load_E.mean() - load_E).sign().to(bias_E))
            return
        histogram = total[: -self.num_experts].view(self.num_experts, self.bins)
        count = histogram.sum(-1, keepdim=True)
        # k/E as it was: assignments over (decisions times experts)
        below = count * (1 - load_E.sum() / (count[0] * self.num_experts).clamp_min(1))
        cumulative = histogram.cumsum(-1)
        index = (cumulative < below).sum(-1, keepdim=True).clamp_max(self.bins - 1)
        inside = histogram.gather(-1, index)
        before = cumulative.gather(-1, index) - inside
        # linear within the bin
        fraction = ((below - before) / inside.clamp_min(1)).clamp(0, 1)
        quantile_E = ((index + fraction) * (2 * self.span / self.bins) - self.span)[:, 0]
        moved_E = (quantile_E.mean() - quantile_E).to(bias_E)
        assign(self.bias, torch.where(count[:, 0] > 0, moved_E, bias_E))

    def extra_repr(self) -> str:
        """Rule and rate."""
        return f"rule={self.rule}, rate={self.rate}, gate={self.gate}"
