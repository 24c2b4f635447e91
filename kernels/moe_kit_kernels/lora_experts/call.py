"""What the CPU forms of LoRA experts are told of a call, and what each of them gives.

A form is a module: `cpu_columns` (`dense`), `cpu_pairs` (`sorted`) and `native`. All add the experts of n projections that share
x and the routing into results that are there, and their gradients into the gradient of x.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank, n projections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_kit_kernels.route_plan import RoutePlan


class Call(NamedTuple):
    """n projections with experts over one input, under one routing."""

    plan: RoutePlan | None
    """The routing; None when every expert is chosen, which only `dense` takes."""
    scale: float
    """Factor on the sums."""
    x_TD: Tensor
    """[T, D] inputs."""
    weights: Tensor
    """[T, K], [P], or [T, E] without a plan."""
    A: Sequence[Tensor]
    """n down projections [E, L, D]."""
    B: Sequence[Tensor]
    """n up projections [E, O_i, L]."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Wanted gradients of n projections with experts."""

    x: bool
    """The input."""
    weights: bool
    """The weights of the pairs."""
    A: tuple[bool, ...]
    """The n down projections."""
    B: tuple[bool, ...]
    """The n up projections."""

    @property
    def hidden(self) -> bool:
        """H is read: by the gradients of the weights and of B only."""
        return self.weights or any(self.B)


def started(base_TO: Tensor | None, x_TD: Tensor, O: int, owned: bool) -> Tensor:
    """Make what a form adds to.

    Args:
        base_TO: result so far [T, O]; None counts as zeros.
        x_TD: [T, D] inputs.
        O: width out.
        owned: the base may be written over.

    Returns:
        [T, O], contiguous: the base itself where it may be and is.
    """
    if base_TO is None:
        return x_TD.new_zeros(x_TD.shape[0], O)
    return base_TO.contiguous() if owned else base_TO.clone(memory_format=torch.contiguous_format)


def finished(y_TO: Tensor, base_TO: Tensor | None, owned: bool) -> Tensor:
    """Put a result where it belongs.

    Args:
        y_TO: what `started` gave, added to.
        base_TO: as there.
        owned: as there.

    Returns:
        [T, O]: the base itself if it is owned.
    """
    return base_TO.copy_(y_TO) if owned and base_TO is not None and y_TO is not base_TO else y_TO


Gradients = tuple[Tensor | None, Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]
"""Of x, of the weights, of the n A and of the n B; None where not wanted."""


class Form(Protocol):
    """The two functions of a form."""

    def add(
        self, call: Call, bases: Sequence[Tensor | None], *, keep: bool, owned: bool = True
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Add the experts to the results.

        Args:
            call: the projections and their routing.
            bases: results so far [T, O_i]; None counts as zeros.
            keep: return H for the backward.
            owned: write over the bases.

        Returns:
            n results [T, O_i], and H as `gradients` of the same form takes it, or ().
        """
        ...

    def gradients(
        self, call: Call, needs: Needs, kept: Sequence[Tensor], dys: Sequence[Tensor], dx: Tensor | None
    ) -> Gradients:
        """Compute the gradients that are asked for.

        Args:
            call: that of the forward.
            needs: which gradients.
            kept: H as `add` gave it.
            dys: gradients of the n results.
            dx: gradient of x so far, written over; None counts as zeros.

        Returns:
            The gradients; that of x with `dx` in it.
        """
        ...
