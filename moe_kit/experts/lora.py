r"""Stacked LoRA experts: `y = base + scale * sum_k w_k B_k A_k x`.

Sources: LoRA, arXiv 2106.09685; as experts of a mixture: MixLoRA, arXiv 2404.15159.

Shapes: T tokens, E experts, L rank, D width in, O width out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_kit.experts.bank import Bank
from moe_kit.routing.decision import Routing


class LoRABank(Bank):
    """E independent LoRA experts of one linear layer.

    B starts at zero, so a fresh bank changes nothing; A starts like PEFT's LoRA.

    Args:
        width_in: D.
        width_out: O.
        num_experts: E.
        rank: L, 1 or more.
        scale: multiplies the mixture; alpha / r in LoRA, 1 where the weights carry everything.
        dropout: probability of dropping an input element of the experts in training, in [0, 1).
        frozen: nothing trains A and B: experts taken over from elsewhere.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        width_in: int,
        width_out: int,
        num_experts: int,
        rank: int,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.width_in, self.width_out, self.num_experts, self.rank = width_in, width_out, num_experts, rank
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else None
        # each expert as torch.nn.Linear starts: uniform with bound 1/sqrt(D)
        bound = 1 / math.sqrt(width_in)
        A_ELD = torch.empty(num_experts, rank, width_in).uniform_(-bound, bound)
        B_EOL = torch.zeros(num_experts, width_out, rank)
        if frozen:
            self.hold_frozen("A", A_ELD)
            self.hold_frozen("B", B_EOL)
        else:
            self.A, self.B = nn.Parameter(A_ELD), nn.Parameter(B_EOL)

    def forward(self, x_TD: Tensor, routing: Routing, base_TO: Tensor | None = None) -> Tensor:
        """Apply the chosen experts; see `Bank.forward`."""
        from moe_kit_kernels import lora_experts

        if self.dropout is not None:
            x_TD = self.dropout(x_TD)
        ids_TK, plan = (None, None) if routing.is_dense else (routing.expert_ids_TK, routing.plan)
        weights_TK = routing.dense_TE() if routing.is_dense else routing.weights_TK
        return lora_experts(x_TD, self.A, self.B, ids_TK, weights_TK, plan=plan, scale=self.scale, base_TO=base_TO)

    def lora_factors(self, weights_E: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of non-zero weight side by side; see `Bank.lora_factors`."""
        used = weights_E.detach().nonzero()[:, 0].to(self.A.device)
        weighted = self.B.detach()[used] * (weights_E.to(self.B)[used] * self.scale)[:, None, None]
        return self.A.detach()[used].flatten(0, 1), weighted.permute(1, 0, 2).flatten(1)

    @staticmethod
    def linear_group(
        banks: Sequence[Bank],
        x_TD: Tensor,
        weights_OD: Sequence[Tensor],
        biases_O: Sequence[Tensor | None],
        routing: Routing,
    ) -> tuple[Tensor, ...] | None:
        """All linears in one operator; None unless all banks are LoRA of one scale without active dropout."""
        from moe_kit_kernels.lora_experts.dispatch import Decision, run_linears

        if not _alike(banks):
            return None
        if routing.is_dense:
            decision = Decision(None, routing.dense_TE(), None)
        else:
            # a few tokens without a graph need no plan
            plan = routing.plan if torch.is_grad_enabled() else None
            decision = Decision(routing.expert_ids_TK, routing.weights_TK, plan)
        A, B = [bank.A for bank in banks], [bank.B for bank in banks]
        # the public `lora_linear_group` checks shapes that a bank and its linear are built with
        return run_linears("lora_linear", "auto", decision, banks[0].scale, x_TD, weights_OD, biases_O, A, B)

    @staticmethod
    def gated_group(
        banks: Sequence[Bank],
        x_TD: Tensor,
        weights_OD: Sequence[Tensor],
        biases_O: Sequence[Tensor | None],
        router_ED: Tensor,
        top_k: int,
    ) -> tuple[Tensor, ...] | None:
        """Decision and all linears in one operator; see `Bank.gated_group`."""
        from moe_kit_kernels.lora_experts.dispatch import run_gated_linears

        if not _alike(banks):
            return None
        A, B = [bank.A for bank in banks], [bank.B for bank in banks]
        return run_gated_linears(top_k, banks[0].scale, x_TD, router_ED, weights_OD, biases_O, A, B)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"experts={self.num_experts}, rank={self.rank}, in={self.width_in}, out={self.width_out}"


def _alike(banks: Sequence[Bank]) -> bool:
    """Whether all banks are LoRA of one scale without active dropout."""
    scale = banks[0].scale if type(banks[0]) is LoRABank else None
    return all(
        type(bank) is LoRABank and bank.scale == scale and (bank.dropout is None or not bank.training) for bank in banks
    )
