"""What the implementations of the feed-forward experts are told of a call.

An implementation is a module (`native`, `cpu`, `triton`) with `forward(call, keep)` and `backward(call, dy_TD, z_PF, needs)`.

Shapes: T tokens, P pairs sorted by expert, E experts, D width, F pre-activation width, H activation width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kit_kernels.route_plan import RoutePlan


class Call(NamedTuple):
    """Experts over tokens, under one routing."""

    x_TD: Tensor
    """[T, D] tokens."""
    up_EFD: Tensor
    """First stack."""
    down_EDH: Tensor
    """Second stack."""
    plan: RoutePlan
    """The routing."""
    weights_P: Tensor
    """[P] in the given order."""
    up_bias_EF: Tensor | None
    """[E, F], optional; no gradient reads it."""
    down_bias_ED: Tensor | None
    """[E, D], optional."""
    activation: str
    """A name in `activations.ACTIVATIONS`."""

    @property
    def gated(self) -> bool:
        """The activation of z's first half multiplies the second."""
        return self.up_EFD.shape[1] == 2 * self.down_EDH.shape[2]

    def bias_dots(self, dy_PD: Tensor) -> Tensor:
        """What the second bias adds to the gradient of the weights.

        Args:
            dy_PD: [P, D] gradient of each sorted row, unweighted.

        Returns:
            [P] `<dy_p, c_e(p)>` in sorted order; of dropped pairs anything.
        """
        assert self.down_bias_ED is not None
        expert_P = self.plan.sorted_expert_P.clamp_max(self.plan.num_experts - 1)
        return torch.linalg.vecdot(dy_PD, self.down_bias_ED.index_select(0, expert_P))


class Needs(NamedTuple):
    """Wanted gradients."""

    x: bool
    """The tokens."""
    up: bool
    """The first stack."""
    down: bool
    """The second stack."""
    weights: bool
    """The weights of the pairs."""
    up_bias: bool
    """The first bias."""
    down_bias: bool
    """The second bias."""

    @property
    def z(self) -> bool:
        """The gradient of the pre-activations is read."""
        return self.x or self.up or self.up_bias
