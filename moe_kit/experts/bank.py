"""The contract of a bank: experts that a `Routing` is applied to.

Shapes: T tokens, D width in, O width out, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from moe_kit.routing.decision import Routing


class Bank(nn.Module, ABC):
    """Experts of one kind, stacked.

    Attributes:
        width_in: D.
        width_out: O.
        num_experts: E.
    """

    width_in: int
    width_out: int
    num_experts: int

    @abstractmethod
    def forward(self, x_TD: Tensor, routing: Routing, base_TO: Tensor | None = None) -> Tensor:
        """Apply the experts that `routing` chose.

        Args:
            x_TD: float [T, D].
            routing: decisions for the T tokens.
            base_TO: float [T, O], output of the frozen path; its storage may be overwritten by the result.

        Returns:
            float [T, O] in the dtype of `base_TO` (else of `x_TD`): base + mixture.
        """

    def linear(self, x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, routing: Routing) -> Tensor | None:
        """The frozen linear and the experts in one operator, where the bank has one.

        Args:
            x_TD: float [T, D].
            weight_OD: frozen weight [O, D].
            bias_O: frozen bias [O] or None.
            routing: decisions for the T tokens.

        Returns:
            float [T, O], or None if this bank has no fused form for these inputs.
        """
        return None
