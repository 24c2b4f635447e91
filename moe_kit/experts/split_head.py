r"""Skills mixed in parameter space, for each head of a split layer on its own.

    A_q = sum_s w_qs A_qs,   B_q = sum_s w_qs B_qs,   y = base + scale * concat_q( B_q sum_q' A_q' x_q' )

The input is cut into Q heads for A, the output for B. Parameters are averaged before the product, so terms
`B_s A_s'` of different skills occur: this is not a sum of expert outputs. By linearity the averages are taken in rank
space, where nothing of a parameter's size is built for each decision.

Sources: Poly (Q = 1), arXiv 2202.13914; MHR, arXiv 2211.03831.

Shapes: T tokens, Q heads, S skills, E = Q*S experts, L rank, D width in, O width out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_kit.errors import ConfigError
from moe_kit.experts.bank import Bank
from moe_kit.routing.decision import Routing


class SplitHeadBank(Bank):
    """Q heads of S skills.

    Args:
        width_in: D, a multiple of `heads`.
        width_out: O, a multiple of `heads`.
        skills: S, in each head.
        rank: L.
        heads: Q; 1 is Poly.
        scale: multiplies the result; PEFT's Poly has 1 / L.
        dropout: on the experts' input in training.

    Raises:
        ConfigError: if a width is no multiple of the heads.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        skills: int,
        rank: int,
        *,
        heads: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or width_in % heads or width_out % heads:
            raise ConfigError(
                f"{heads} heads do not divide a linear of widths {width_in} and {width_out}: choose a common divisor "
                "of all adapted widths in bank_options={'heads': ...}."
            )
        self.width_in, self.width_out, self.rank, self.skills = width_in, width_out, rank, skills
        self.num_groups, self.num_experts = heads, heads * skills
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.A = nn.Parameter(torch.empty(heads * skills, rank, width_in // heads))
        self.B = nn.Parameter(torch.zeros(heads * skills, width_out // heads, rank))
        bound = 1 / math.sqrt(width_in // heads)
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, x_TD: Tensor, routing: Routing, base_TO: Tensor | None = None) -> Tensor:
        """Mix, then apply; see `Bank.forward`."""
        if self.dropout is not None:
            x_TD = self.dropout(x_TD)
        heads = self.num_groups
        w_TQS = routing.dense_TE().unflatten(-1, (heads, self.skills)).to(self.A.dtype)
        A_QSLd, B_QSol = self.A.unflatten(0, (heads, -1)), self.B.unflatten(0, (heads, -1))
        x_TQd = x_TD.to(self.A.dtype).unflatten(-1, (heads, -1))
        h_TQSL = torch.einsum("tqd,qsld->tqsl", x_TQd, A_QSLd)
        h_TL = torch.einsum("tqsl,tqs->tl", h_TQSL, w_TQS.to(h_TQSL.dtype))
        spread_TQSL = w_TQS.to(h_TL.dtype)[..., None] * h_TL[:, None, None, :]
        mixed_TO = torch.einsum("tqsl,qsol->tqo", spread_TQSL, B_QSol).flatten(1) * self.scale
        return mixed_TO.to(x_TD.dtype) if base_TO is None else base_TO + mixed_TO.to(base_TO.dtype)

    def lora_factors(self, weights_E: Tensor) -> tuple[Tensor, Tensor]:
        """The averaged skills; see `Bank.lora_factors`."""
        heads = self.num_groups
        w_QS = weights_E.view(heads, self.skills).to(self.A)
        A_LD = torch.einsum("qs,qsld->lqd", w_QS, self.A.detach().unflatten(0, (heads, -1))).flatten(1)
        B_OL = torch.einsum("qs,qsol->qol", w_QS, self.B.detach().unflatten(0, (heads, -1))).flatten(0, 1)
        return A_LD, B_OL * self.scale

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"heads={self.num_groups}, skills={self.skills}, rank={self.rank}, in={self.width_in}, out={self.width_out}"
        )
