"""Top-k gating in few passes, with the gradient by hand.

A full stable sort is the price of "ties to the lowest index", and most rows have no ties: `torch.topk` of K + 1 values
is taken, and only if two of them are equal somewhere is the sort run. Reading that one flag costs nothing on the CPU;
on an accelerator the sort runs always, since the flag would wait for the device.

With renormalised softmax the weights are the softmax of the chosen logits alone, so the other experts are never
exponentiated and get exactly zero gradient:

    p = softmax(logits[ids]),  w = scale * p,      dlogits[ids] = p * (g - sum p g),  g = scale * dw

Legend: T tokens, K slots a token, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kit_kernels.topk_gate.reference import EPSILON


def stable_topk(scores_TE: Tensor, k: int) -> Tensor:
    """Take the k largest of each row, best first, equal values to the lowest index.

    Args:
        scores_TE: [T, E] scores.
        k: K, at most E.

    Returns:
        [T, K] int64.
    """
    E = scores_TE.shape[1]
    if scores_TE.device.type == "cpu" and k < E and not torch.compiler.is_compiling():
        values, ids = scores_TE.topk(k + 1, dim=-1)
        if not bool((values[:, 1:] == values[:, :-1]).any()):
            return ids[:, :k].contiguous()
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


class ChosenWeights(torch.autograd.Function):
    """`apply(logits_TE, ids_TK, score, renormalize, scale)` -> [T, K]; saves nothing of width E but for a plain softmax."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, ids_TK: Tensor, score: str, renormalize: bool, scale: float) -> Tensor:
        """Compute the weights of the chosen experts."""
        ctx.how, ctx.shape = (score, renormalize, scale), logits_TE.shape
        if score == "softmax" and renormalize:
            p_TK = logits_TE.gather(1, ids_TK).softmax(-1)
            ctx.save_for_backward(ids_TK, p_TK)
            return p_TK * scale
        if score == "softmax":
            s_TE = logits_TE.softmax(-1)
            ctx.save_for_backward(ids_TK, s_TE)
            return s_TE.gather(1, ids_TK) * scale
        s_TK = logits_TE.gather(1, ids_TK).sigmoid()
        ctx.save_for_backward(ids_TK, s_TK)
        return s_TK / (s_TK.sum(-1, keepdim=True) + EPSILON) * scale if renormalize else s_TK * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw_TK: Tensor) -> Any:
        """Compute the gradient of the logits."""
        ids_TK, s = ctx.saved_tensors
        score, renormalize, scale = ctx.how
        g_TK = dw_TK * scale
        if score == "softmax" and not renormalize:
            inner = (g_TK * s.gather(1, ids_TK)).sum(-1, keepdim=True)
            dlogits_TE = (s * -inner).scatter_add_(1, ids_TK, g_TK * s.gather(1, ids_TK))
            return dlogits_TE, None, None, None, None
        if score == "softmax":
            d_TK = s * (g_TK - (s * g_TK).sum(-1, keepdim=True))
        elif renormalize:
            total = s.sum(-1, keepdim=True) + EPSILON
            d_TK = (g_TK - (g_TK * s).sum(-1, keepdim=True) / total) / total * s * (1 - s)
        else:
            d_TK = g_TK * s * (1 - s)
        return d_TK.new_zeros(ctx.shape).scatter_(1, ids_TK, d_TK), None, None, None, None
