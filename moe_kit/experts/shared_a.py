r"""LoRA experts with one down projection for all: `y = base + scale * sum_k w_k B_k (A x)`.

Source: HydraLoRA, arXiv 2404.19245.

Shapes: T tokens, P (token, expert) pairs, E experts, L rank, D width in, O width out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kit.experts.bank import Bank
from moe_kit.routing.decision import Routing


class SharedABank(Bank):
    """One A, E up projections.

    Args:
        width_in: D.
        width_out: O.
        num_experts: E.
        rank: L.
        scale: multiplies the mixture.
        dropout: on the experts' input in training.
    """

    def __init__(
        self, width_in: int, width_out: int, num_experts: int, rank: int, *, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.width_in, self.width_out, self.num_experts, self.rank = width_in, width_out, num_experts, rank
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.A = nn.Parameter(torch.empty(rank, width_in))
        self.B = nn.Parameter(torch.zeros(num_experts, width_out, rank))
        bound = 1 / math.sqrt(width_in)
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, x_TD: Tensor, routing: Routing, base_TO: Tensor | None = None) -> Tensor:
        """Project once, then apply the chosen B; see `Bank.forward`."""
        from moe_kit_kernels import lora_up

        if self.dropout is not None:
            x_TD = self.dropout(x_TD)
        h_TL = F.linear(x_TD.to(self.A.dtype), self.A)
        plan = routing.plan
        h_PL = h_TL.index_select(0, plan.token_P)
        y_TO = lora_up(h_PL, self.B, plan, routing.weights_TK, scale=self.scale, base_TO=base_TO)
        return y_TO if base_TO is not None else y_TO.to(x_TD.dtype)

    def lora_factors(self, weights_E: Tensor) -> tuple[Tensor, Tensor]:
        """The shared A and the weighted sum of B; see `Bank.lora_factors`."""
        mixed = torch.einsum("e,eol->ol", weights_E.to(self.B), self.B.detach())
        return self.A.detach().clone(), mixed * self.scale

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"experts={self.num_experts}, rank={self.rank}, in={self.width_in}, out={self.width_out}"
