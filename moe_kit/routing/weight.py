"""Weights: how much each chosen expert counts, in float32.

A weight rule sees the logits, the selection, and returns weights of the selection's shape: [N, K] for a sparse one
(0 in empty slots), [N, E] for a dense one (0 where not selected).

Shapes: N decisions, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
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
