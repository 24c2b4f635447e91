r"""Experts of one column each, whose weight is the score itself: `y = base + scale * sum_k (a_k x) b_k`.

The projection `a_k x` is the router's score (`FrozenSparseScore`) and arrives as the weight, so the bank holds B only
and no explicit router exists. Dropout of the experts' input is the score's for the same reason.

Source: FlyLoRA, arXiv 2510.08396.

Shapes: T tokens, E experts (the rank of the whole adapter), O width out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kit.experts.bank import Bank
from moe_kit.routing.decision import Routing


class RankOneBank(Bank):
    """E columns of an up projection.

    Args:
        width_in: D, of the layer; the bank does not read the input.
        width_out: O.
        num_experts: E.
        scale: multiplies the mixture; alpha / E in FlyLoRA.
    """

    def __init__(self, width_in: int, width_out: int, num_experts: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.width_in, self.width_out, self.num_experts = width_in, width_out, num_experts
        self.scale = scale
        # three dimensions like every bank: expert first
        self.B = nn.Parameter(torch.zeros(num_experts, width_out, 1))

    def forward(self, x_TD: Tensor, routing: Routing, base_TO: Tensor | None = None) -> Tensor:
        """Weights times columns; see `Bank.forward`."""
        # a dense product: E is a LoRA's rank, and unselected columns get an exact zero as weight
        mixed_TO = F.linear(routing.dense_TE().to(self.B.dtype), self.B[..., 0].T) * self.scale
        return mixed_TO.to(x_TD.dtype) if base_TO is None else base_TO + mixed_TO.to(base_TO.dtype)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"experts={self.num_experts}, out={self.width_out}"
