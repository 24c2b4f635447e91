"""Weights: how much each chosen expert counts, in float32.

A weight rule sees the logits, the selection, and returns weights of the selection's shape: [N, K] for a sparse one
(0 in empty slots), [N, E] for a dense one (0 where not selected).

Shapes: N decisions, E experts, K slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from moe_kit.routing.select import Selection


class Weight(Protocol):
    """A rule from logits and selection to weights."""

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """Weights of the selection's shape."""
        ...


def at_selection(value_NE: Tensor, selection: Selection) -> Tensor:
    """Values of the chosen experts, 0 elsewhere.

    Args:
        value_NE: float32 [N, E].
        selection: which experts.

    Returns:
        [N, K] for a sparse selection, [N, E] for a dense one.
    """
    if selection.ids_NK is None:
        return torch.where(selection.selected_NE, value_NE, 0.0)
    ids_NK = selection.ids_NK
    return value_NE.gather(-1, ids_NK.clamp_min(0)).masked_fill(ids_NK < 0, 0.0)


@dataclass(frozen=True)
class SoftmaxWeight:
    """Softmax over all experts, read at the chosen ones; they sum to less than 1 unless all are chosen."""

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """Weights in [0, 1]."""
        return at_selection(logits_NE.softmax(-1), selection)


@dataclass(frozen=True)
class SelectedSoftmaxWeight:
    """Softmax over the chosen experts only; equal to a softmax over all that is renormalised over the chosen."""

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """Weights that sum to 1, or to 0 where nothing was chosen."""
        if selection.considered_NK is not None:
            # normalised before some choices were dropped
            assert selection.ids_NK is not None
            total = logits_NE.gather(-1, selection.considered_NK).logsumexp(-1, keepdim=True)
            return at_selection((logits_NE - total).exp(), selection)
        if selection.is_full and not torch.is_grad_enabled():
            return logits_NE.gather(-1, selection.ids_NK).softmax(-1)
        if selection.is_full and not torch.compiler.is_compiling():
            from moe_kit_kernels.topk_gate.cpu import ChosenWeights

            # one pass with its gradient by hand, instead of the ten operations below
            return ChosenWeights.apply(logits_NE, selection.ids_NK, "softmax", True, 1.0)
        if selection.ids_NK is None:
            chosen = selection.selected_NE
            values = logits_NE.masked_fill(~chosen, float("-inf"))
        else:
            chosen = selection.ids_NK >= 0
            values = logits_NE.gather(-1, selection.ids_NK.clamp_min(0)).masked_fill(~chosen, float("-inf"))
        # an all-empty row would be 0/0; where() keeps its gradient finite too
        values = torch.where(chosen.any(-1, keepdim=True), values, 0.0)
        return torch.where(chosen, values.softmax(-1), 0.0)


@dataclass(frozen=True)
class SigmoidWeight:
    """`sigmoid(logit)`, optionally divided by the sum over the chosen and scaled.

    Attributes:
        renormalise: divide by the sum over the chosen experts.
        factor: multiplies the result (2.5 in DeepSeek-V3).
    """

    renormalise: bool = False
    factor: float = 1.0

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """Weights in [0, factor]."""
        weights = at_selection(logits_NE.sigmoid(), selection)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.factor


@dataclass(frozen=True)
class ConstantWeight:
    """The same weight for every chosen expert: no gradient reaches the router through it.

    Attributes:
        value: the weight. 1 is the indicator; ReMix uses 2/(k r) or 2/sqrt(k r).
    """

    value: float = 1.0

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """`value` at the chosen experts."""
        chosen = selection.selected_NE if selection.ids_NK is None else selection.ids_NK >= 0
        return chosen.float() * self.value


@dataclass(frozen=True)
class RawWeight:
    """The score itself (FlyLoRA's `A x`)."""

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """The logits at the chosen experts."""
        return at_selection(logits_NE, selection)


@dataclass(frozen=True)
class ReLUWeight:
    """`max(logit, 0)` (ReMoE)."""

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """Weights of 0 or more."""
        return at_selection(logits_NE.relu(), selection)


@dataclass(frozen=True)
class RelaxedBernoulliWeight:
    """A relaxed coin for each expert, normalised within groups of experts.

        z = sigmoid((logit + log u - log(1 - u)) / temperature) in training, sigmoid(logit) in evaluation
        w = z / (sum of z in the group + epsilon)

    Attributes:
        groups: experts lie in this many equal groups (heads of a split bank), each normalised on its own.
        temperature: of the relaxation.
        sample: draw in training; False uses sigmoid(logit) there too.

    Source: Poly, arXiv 2202.13914; MHR, arXiv 2211.03831.
    """

    groups: int = 1
    temperature: float = 1.0
    sample: bool = True

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """Weights that sum to 1 in each group."""
        if training and self.sample:
            uniform = torch.rand_like(logits_NE).clamp_(1e-7, 1 - 1e-7)
            coins = torch.sigmoid((logits_NE + uniform.log() - (-uniform).log1p()) / self.temperature)
        else:
            coins = logits_NE.sigmoid()
        chosen = selection.chosen_NE(logits_NE.shape[-1])
        grouped = torch.where(chosen, coins, 0.0).unflatten(-1, (self.groups, -1))
        weights = grouped / (grouped.sum(-1, keepdim=True) + 1e-12)
        return at_selection(weights.flatten(-2), selection)


@dataclass(frozen=True)
class StraightThroughWeight:
    """Value 1 at the chosen, gradient of the softmax: `1 + p - stop_gradient(p)`.

    With `select_options={"gumbel": True}` the softmax sees the Gumbel noise of the choice: straight-through Gumbel.

    Attributes:
        temperature: of the softmax.
    """

    temperature: float = 1.0

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """Weights of exactly 1 in value."""
        scores = logits_NE if selection.scores_NE is None else selection.scores_NE
        soft = (scores / self.temperature).softmax(-1)
        # grouped so that the value is 1 exactly
        return at_selection(1 + (soft - soft.detach()), selection)


@dataclass(frozen=True)
class CountScaledSoftmaxWeight:
    """Softmax over the chosen, times `lambda(m)`, m the number of chosen experts.

        lambda(m) = E_z[ sqrt(shared) / norm( renormalised first m of softmax(z) ) ],  z ~ N(0, I_E)

    It offsets that an average of m outputs shrinks with m.

    Attributes:
        num_experts: E.
        shared: number of shared experts beside the routed ones; 1 makes lambda(1) = 1.

    Source: EC-DLM, arXiv 2604.01622 (10 000 draws, fixed seed).
    """

    num_experts: int
    shared: int = 1

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """Weights that sum to lambda(m), or to 0 where nothing was chosen."""
        weights = SelectedSoftmaxWeight()(logits_NE, selection, training)
        count = selection.chosen_NE(self.num_experts).sum(-1, keepdim=True)
        table = torch.tensor(count_scale(self.num_experts, self.shared), device=weights.device)
        return weights * table[count]


@lru_cache(maxsize=64)
def count_scale(num_experts: int, shared: int) -> tuple[float, ...]:
    """lambda(m) for m = 0 .. E, by Monte Carlo with its own seed.

    Args:
        num_experts: E.
        shared: number of shared experts.

    Returns:
        E + 1 floats; lambda(0) = 1.
    """
    # a private generator is safe here: nothing of this is drawn in a forward pass
    draws = torch.randn(10_000, num_experts, generator=torch.Generator().manual_seed(42)).softmax(-1)
    norms = draws.square().cumsum(-1).sqrt() / draws.cumsum(-1)
    scales = (math.sqrt(shared) / norms).mean(0)
    return (1.0, *scales.tolist())


@dataclass(frozen=True)
class DenseMixerWeight:
    """Value of a sparse softmax mixture, gradient to the router as if every expert had been used.

        without renormalisation   w = p m + (1 - m) (p - sg(p))
        with                      w = p m / Z + (1 - m) (p - sg(p)) / sg(Z),   Z = sum of p over the chosen

    m marks the chosen. The weights of the others are 0 in value, so their experts get no gradient; the bank computes
    all experts.

    Attributes:
        renormalise: divide by the sum over the chosen.

    Source: DenseMixer, github.com/yaof20/DenseMixer.
    """

    renormalise: bool = True
    computes_all = True

    def __call__(self, logits_NE: Tensor, selection: Selection, training: bool) -> Tensor:
        """float32 [N, E], 0 in value where not chosen."""
        probability = logits_NE.softmax(-1)
        chosen = selection.chosen_NE(logits_NE.shape[-1])
        used = torch.where(chosen, probability, 0.0)
        ghost = torch.where(chosen, 0.0, probability - probability.detach())
        if not self.renormalise:
            return used + ghost
        total = used.sum(-1, keepdim=True).clamp_min(1e-20)
        return used / total + ghost / total.detach()
