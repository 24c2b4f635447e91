"""A mixture: a router with a bank, usable on its own in any PyTorch model.

Shapes: B rows, S sequence, T = B*S tokens, D width in, O width out.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_kit.experts.bank import Bank
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.router import Router


class Mixture(nn.Module):
    """`y = bank(x, router(x))`.

    Args:
        router: makes the decision.
        bank: applies it.
    """

    def __init__(self, router: Router, bank: Bank) -> None:
        super().__init__()
        self.router, self.bank = router, bank
        router.banks.append(bank)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Mixture output.

        Args:
            x: float [..., D].
            context: facts about the pass; None = no padding, one sequence a row.

        Returns:
            float [..., O].
        """
        routing = self.router(x, context)
        return self.bank(x.reshape(-1, x.shape[-1]), routing).view(*x.shape[:-1], self.bank.width_out)
