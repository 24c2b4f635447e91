r"""Expert choice: every expert takes its best tokens, so loads are equal by construction.

    c_b = max(1, floor(S_b k / E))           tokens an expert takes of sequence b, S_b its real length
    chosen_te = t is among the top c_b tokens of its sequence for expert e

It looks at the whole sequence: under a causal mask, whether a token is kept depends on later ones. The causal form
compares each score with a threshold per expert instead, an exponential moving average of the global cut-off,

    chosen_te = score_te > theta_e,     theta_e <- decay theta_e + (1 - decay) cut-off_e   after the step,

in training and inference alike; how many tokens an expert takes then varies.

Sources: arXiv 2202.09368 (choice on softmax over experts, weight = that softmax); EC-DLM, arXiv 2604.01622 (choice on
raw logits, weight = softmax over the experts that chose a token; capacity scheduled by mask ratio); thresholds,
arXiv 2603.11535.

Shapes: N decisions (tokens), E experts, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.errors import ConfigError, RoutingError
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.decision import Routing
from moe_kit.routing.frozen import assign, whole
from moe_kit.routing.loss_free import gate_scores
from moe_kit.routing.scope import Decisions, pool_sum
from moe_kit.routing.select import Selection
from moe_kit.routing.step import StepState


def _gaussian(r: Tensor, sigma: float = 0.22) -> Tensor:
    edge = math.exp(-0.125 / sigma**2)
    return (torch.exp(-((r - 0.5) ** 2) / (2 * sigma**2)) - edge) / (1 - edge)


SCHEDULES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda r: r,
    "linear_reverse": lambda r: 1 - r,
    "cosine": lambda r: (1 - torch.cos(math.pi * r)) / 2,
    "cosine_reverse": lambda r: (1 + torch.cos(math.pi * r)) / 2,
    "gaussian": _gaussian,
    "gaussian_reverse": lambda r: 1 - _gaussian(r),
}
"""Share of the capacity range as a function of a scalar in [0, 1] (a mask ratio, the progress of training)."""


def scheduled_k(r: Tensor, schedule: str, k_min: int, k_max: int) -> Tensor:
    """Experts a token on average, as a function of a scalar.

    Args:
        r: float, in [0, 1].
        schedule: a name in `SCHEDULES`.
        k_min: least value.
        k_max: greatest value.

    Returns:
        Whole numbers as floats, of r's shape: clamp(round(k_min + (k_max - k_min) s(r))).

    Raises:
        ConfigError: if the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}.")
    share = SCHEDULES[schedule](r.float())
    return (k_min + (k_max - k_min) * share).round().clamp(k_min, k_max)


def rank_in_sequence(scores_NE: Tensor, sequence_N: Tensor | None, count: int) -> Tensor:
    """Rank of each token within its sequence, for each expert; 0 is best, ties go to the earlier token.

    Args:
        scores_NE: float [N, E].
        sequence_N: int64 [N]; None = one sequence.
        count: number of sequences.

    Returns:
        int64 [N, E].
    """
    by_score = scores_NE.sort(dim=0, descending=True, stable=True).indices
    if sequence_N is None or count == 1:
        order, start = by_score, None
    else:
        # two stable sorts: by score, then by sequence
        by_sequence = sequence_N[by_score].sort(dim=0, stable=True)
        order = by_score.gather(0, by_sequence.indices)
        lengths = torch.zeros(count, dtype=torch.long, device=sequence_N.device)
        lengths = lengths.index_add(0, sequence_N, torch.ones_like(sequence_N))
        start = (lengths.cumsum(0) - lengths)[sequence_N][:, None]
    places = torch.arange(scores_NE.shape[0], device=scores_NE.device)[:, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, places)
    return rank if start is None else rank - start


class SelectExpertChoice(nn.Module):
    """Experts choose tokens, each sequence on its own, with real lengths.

    Args:
        k: experts a token on average; an expert takes max(1, floor(length k / E)) tokens of a sequence.
        gate: space of the comparison: "logits" (EC-DLM), "softmax" (Zhou) or "sigmoid".
        schedule: k as a function of a named scalar: a name in `SCHEDULES`, with `k_min`, `k_max` and `scalar`.
        k_min: least scheduled k.
        k_max: greatest scheduled k.
        scalar: name of the scalar in [0, 1], given through `routing_inputs(model, <name>=...)`.

    Raises:
        ConfigError: if the gate or schedule is unknown, or the bounds are missing.
    """

    # equal logits for all tokens do not make its choice constant
    reads_tokens = True

    def __init__(
        self,
        k: int,
        *,
        gate: str = "logits",
        schedule: str | None = None,
        k_min: int | None = None,
        k_max: int | None = None,
        scalar: str = "mask_ratio",
    ) -> None:
        super().__init__()
        gate_scores(torch.zeros(1, 1), gate)
        if schedule is not None:
            if k_min is None or k_max is None or not 1 <= k_min <= k_max:
                raise ConfigError(f"a capacity schedule needs 1 <= k_min <= k_max, got {k_min} and {k_max}.")
            scheduled_k(torch.zeros(1), schedule, k_min, k_max)
        self.k, self.gate, self.schedule, self.scalar = k, gate, schedule, scalar
        self.k_min, self.k_max = k_min, k_max

    def capacity_B(self, lengths_B: Tensor, num_experts: int, context: RoutingContext) -> Tensor:
        """Tokens an expert takes of each sequence.

        Args:
            lengths_B: real tokens of each sequence.
            num_experts: E.
            context: holds the scalar of a schedule.

        Returns:
            int64 [B].

        Raises:
            RoutingError: if the scalar of the schedule was not given.
        """
        if self.schedule is None:
            k_B: Any = self.k
        else:
            if self.scalar not in context.scalars:
                raise RoutingError(
                    f"the capacity schedule {self.schedule!r} reads the scalar {self.scalar!r}, which this pass did "
                    f"not get: wrap the call in `with routing_inputs(model, {self.scalar}=...)`."
                )
            given = torch.as_tensor(context.scalars[self.scalar], device=lengths_B.device)
            given = context.rows(given, lengths_B.shape[0], self.scalar) if given.dim() else given
            assert self.k_min is not None
            assert self.k_max is not None
            k_B = scheduled_k(given, self.schedule, self.k_min, self.k_max).double()
        # float64: floor(length k / E) must not lose a token to rounding
        return (lengths_B.double() * k_B / num_experts).floor().clamp_min(1).long()

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """Dense selection [N, E]; padding is never chosen."""
        compared = gate_scores(scores_NE, self.gate).detach()
        real_N = decisions.mask_N
        if real_N is None:
            real_N = torch.ones(compared.shape[0], dtype=torch.bool, device=compared.device)
        compared = compared.masked_fill(~real_N[:, None], float("-inf"))
        count = decisions.num_sequences or 1
        sequence_N = decisions.sequence_N
        if sequence_N is None:
            sequence_N = torch.zeros(compared.shape[0], dtype=torch.long, device=compared.device)
        lengths_B = pool_sum(real_N[:, None].double(), sequence_N, count)[:, 0]
        capacity_B = self.capacity_B(lengths_B, compared.shape[1], context)
        rank_NE = rank_in_sequence(compared, sequence_N, count)
        return Selection(selected_NE=(rank_NE < capacity_B[sequence_N][:, None]) & real_N[:, None])


class SelectEMAThreshold(StepState):
    """The causal form of expert choice: a token joins an expert whose threshold its score exceeds.

    Args:
        num_experts: E.
        k: experts a token on average that the thresholds aim at.
        gate: space of the comparison: "logits", "softmax" or "sigmoid".
        decay: of the moving average of the cut-offs; the first step copies its cut-off.

    Attributes:
        threshold: float32 frozen parameter [E]. It moves after the optimizer step, so no decision depends on its own
            batch. Before the first step it is 0, which admits about half of the experts under centred logits.
        steps: float32 frozen parameter [1], steps so far.
    """

    threshold: Tensor
    steps: Tensor

    def __init__(self, num_experts: int, k: int, *, gate: str = "logits", decay: float = 0.99) -> None:
        gate_scores(torch.zeros(1, 1), gate)
        if not 0 <= decay < 1:
            raise ConfigError(f"decay is {decay}, expected a value in [0, 1).")
        super().__init__(num_experts + 1)
        self.num_experts, self.k, self.gate, self.decay = num_experts, k, gate, decay
        self.hold_frozen("threshold", torch.zeros(num_experts))
        self.hold_frozen("steps", torch.zeros(()))

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """Dense selection [N, E]."""
        return Selection(selected_NE=gate_scores(scores_NE, self.gate).detach() > self.threshold)

    def measure(self, routing: Routing) -> Tensor:
        """Cut-off of each expert in this pass, and 1; zeros if nothing was real."""
        if routing.logits_NE is None:
            return self.threshold.new_zeros(self.size)
        compared = gate_scores(routing.logits_NE, self.gate)
        tokens = compared.shape[0]
        if routing.mask_N is None:
            real = torch.tensor(float(tokens), device=compared.device)
        else:
            compared = compared.masked_fill(~routing.mask_N[:, None], float("-inf"))
            real = routing.mask_N.sum()
        place = (real * self.k / self.num_experts).floor().long().clamp(1, max(tokens, 1)) - 1
        cut_E = compared.sort(dim=0, descending=True).values.index_select(0, place[None])[0]
        found = real > 0
        return torch.cat([torch.where(found, cut_E, 0.0), found[None].to(cut_E)])

    def update(self, total: Tensor) -> None:
        """Move towards the mean cut-off of the step."""
        passes = total[-1]
        threshold_E, steps = whole(self.threshold), whole(self.steps)
        cut_E = (total[:-1] / passes.clamp_min(1)).to(threshold_E)
        decay = torch.where(steps > 0, self.decay, 0.0)
        moved_E = decay * threshold_E + (1 - decay) * cut_E
        assign(self.threshold, torch.where(passes > 0, moved_E, threshold_E))
        assign(self.steps, steps + (passes > 0).to(steps))
