"""The contract of a bank: experts that a `Routing` is applied to.

Shapes: T tokens, D width in, O width out, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from moe_kit.errors import RoutingError
from moe_kit.routing.decision import Routing
from moe_kit.routing.frozen import HoldsFrozen


class Bank(HoldsFrozen, ABC):
    """Experts of one kind, stacked.

    Attributes:
        width_in: D.
        width_out: O.
        num_experts: E, as the router sees them: groups times experts of a group.
        num_groups: groups of experts that are weighted on their own (heads of a split bank), usually 1.
    """

    width_in: int
    width_out: int
    num_experts: int
    num_groups: int = 1

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

    def lora_factors(self, weights_E: Tensor) -> tuple[Tensor, Tensor]:
        """The plain LoRA that this bank is under constant weights.

        Args:
            weights_E: float [E], one weight for each expert, the same for every token.

        Returns:
            (A [L', D], B [O, L']) with `B @ A` equal to what the bank adds, its scale included.

        Raises:
            RoutingError: if the bank is no constant matrix under constant weights.
        """
        raise RoutingError(f"a {type(self).__name__} under constant weights is no LoRA: its weights carry the input.")

    @staticmethod
    def linear_group(
        banks: Sequence[Bank],
        x_TD: Tensor,
        weights_OD: Sequence[Tensor],
        biases_O: Sequence[Tensor | None],
        routing: Routing,
    ) -> tuple[Tensor, ...] | None:
        """One or several frozen linears with their banks over one input and one routing (q, k, v; gate, up).

        Args:
            banks: one a linear.
            x_TD: float [T, D].
            weights_OD: frozen weights [O_i, D].
            biases_O: frozen biases [O_i] or None.
            routing: decisions for the T tokens.

        Returns:
            One float [T, O_i] a linear, or None if these banks have no such form for these inputs.
        """
        return None

    @staticmethod
    def gated_group(
        banks: Sequence[Bank],
        x_TD: Tensor,
        weights_OD: Sequence[Tensor],
        biases_O: Sequence[Tensor | None],
        router_ED: Tensor,
        top_k: int,
    ) -> tuple[Tensor, ...] | None:
        """A linear top-k router together with the linears it routes: one operator decides and applies the decision.

        Args:
            banks: one a linear.
            x_TD: float [T, D].
            weights_OD: frozen weights [O_i, D].
            biases_O: frozen biases [O_i] or None.
            router_ED: float [E, D], weight of the router; weights are the softmax of the K best logits.
            top_k: K.

        Returns:
            Logits [T, E], ids [T, K], weights [T, K] and one float [T, O_i] a linear, or None if these banks have no
            such form for these inputs.
        """
        return None
