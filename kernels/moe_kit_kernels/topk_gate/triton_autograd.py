"""Autograd of top-k gating on the Triton kernels; equations in `reference`.

Kept for the backward: the logits (the caller has them anyway) and the ids. The scores are computed again.

Legend: T tokens, K slots a token, E experts.
"""

from typing import Any

import torch
import triton as _triton
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.common.device import on_its_device
from moe_kit_kernels.topk_gate.reference import EPSILON
from moe_kit_kernels.topk_gate.triton import topk_gate_backward_kernel, topk_gate_kernel


def block_rows(num_experts: int) -> tuple[int, int]:
    """Size a program: about 1024 scores in registers.

    Args:
        num_experts: E.

    Returns:
        BM and EP.
    """
    EP = _triton.next_power_of_2(num_experts)
    return max(1, min(64, 1024 // EP)), EP


class TritonGate(torch.autograd.Function):
    """`apply(logits_TE, bias_E, k, score, renormalize, scale)` -> ids [T, K], weights [T, K], counts [E]."""

    @staticmethod
    @on_its_device
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, k: int, score: str, renormalize: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Launch the forward kernel and sum the partial counts."""
        logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
        T, E = logits_TE.shape
        BM, EP = block_rows(E)
        programs = _triton.cdiv(T, BM)
        ids_TK = logits_TE.new_empty(T, k, dtype=torch.int64)
        weights_TK = logits_TE.new_empty(T, k, dtype=torch.float32)
        partial = logits_TE.new_empty(programs, E, dtype=torch.int64)
        if T:
            topk_gate_kernel[(programs,)](
                logits_TE,
                bias_E.float().contiguous() if bias_E is not None else logits_TE,
                ids_TK,
                weights_TK,
                partial,
                scale,
                EPSILON,
                T,
                E,
                logits_TE.stride(0),
                K=k,
                SOFTMAX=score == "softmax",
                BIAS=bias_E is not None,
                RENORMALIZE=renormalize,
                BM=BM,
                EP=EP,
                KP=_triton.next_power_of_2(k),
            )
        ctx.how = (k, score, renormalize, scale)
        ctx.save_for_backward(logits_TE, ids_TK)
        counts_E = partial.sum(0)
        ctx.mark_non_differentiable(ids_TK, counts_E)
        return ids_TK, weights_TK, counts_E

    @staticmethod
    @first_order
    @on_its_device
    def backward(ctx: Any, _ids: Any, dw_TK: Tensor, _counts: Any) -> Any:
        """Launch the backward kernel."""
        logits_TE, ids_TK = ctx.saved_tensors
        k, score, renormalize, scale = ctx.how
        T, E = logits_TE.shape
        dlogits_TE = logits_TE.new_empty(T, E, dtype=torch.float32)
        BM, EP = block_rows(E)
        if T:
            topk_gate_backward_kernel[(_triton.cdiv(T, BM),)](
                logits_TE,
                ids_TK,
                dw_TK.float().contiguous(),
                dlogits_TE,
                scale,
                EPSILON,
                T,
                E,
                logits_TE.stride(0),
                K=k,
                SOFTMAX=score == "softmax",
                RENORMALIZE=renormalize,
                BM=BM,
                EP=EP,
            )
        return dlogits_TE.to(logits_TE.dtype), None, None, None, None, None
