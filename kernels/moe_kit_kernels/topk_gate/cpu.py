"""Top-k gating in few passes, with the gradient by hand.

A full stable sort is the price of "ties to the lowest index", and most rows have no ties: `torch.topk` of K + 1 values
is taken, and only if two of them are equal somewhere is the sort run. Reading that one flag costs nothing on the CPU;
on an accelerator the sort runs always, since the flag would wait for the device. `gate` knows cheaper ways for rows that
are short or many.

With renormalised softmax the weights are the softmax of the chosen logits alone, so the other experts are never
exponentiated and get exactly zero gradient:

    p = softmax(logits[ids]),  w = scale * p,      dlogits[ids] = p * (g - sum p g),  g = scale * dw

Legend: T tokens, K slots a token, E experts.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
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
        if not _has_ties(values):
            return ids[:, :k].contiguous()
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def _has_ties(values_TK: Tensor) -> bool:
    """Whether neighbours in a row of sorted values are equal; a few rows are faster to look at in Python."""
    if values_TK.numel() <= 32:
        return any(len(set(row)) < len(row) for row in values_TK.tolist())
    return bool((values_TK[:, 1:] == values_TK[:, :-1]).any())


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
    @first_order
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


def gate(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best of each row and weigh them by the softmax of their logits; nothing for autograd.

    Args:
        logits_TE: [T, E] logits, float32 or float64.
        k: K, at most E.

    Returns:
        Ids [T, K] best first, equal values to the lowest index, and weights [T, K] that sum to 1.
    """
    if logits_TE.numel() <= 64:
        # a few rows: any two equal logits leave it to the sort
        if all(len(set(row)) == len(row) for row in logits_TE.tolist()):
            values, ids = logits_TE.topk(k)
            return ids, values.softmax(-1)
    elif logits_TE.numel() > 4096 and k <= 4:
        values, ids = _largest(logits_TE, k)
        # with fewer than k finite logits a pass may have come to an expert that was taken before
        if float(values[:, -1].min()) > -math.inf:
            return ids, values.softmax(-1)
    elif logits_TE.shape[1] <= 16:
        # short rows: the stable sort itself costs less than to look for ties
        values, ids = logits_TE.sort(dim=-1, descending=True, stable=True)
        return ids.narrow(1, 0, k).contiguous(), values.narrow(1, 0, k).softmax(-1)
    elif k < logits_TE.shape[1]:
        values, ids = logits_TE.topk(k + 1, dim=-1)
        if not _has_ties(values):
            return ids.narrow(1, 0, k).contiguous(), values.narrow(1, 0, k).softmax(-1)
    ids_TK = stable_topk(logits_TE, k)
    return ids_TK, logits_TE.gather(1, ids_TK).softmax(-1)


def _largest(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, best first, by k passes: `max` is vectorised, and takes the first of equal values."""
    values: list[Tensor] = []
    ids: list[Tensor] = []
    for _ in range(k):
        if ids:
            scores_TE = scores_TE.scatter(1, ids[-1], -math.inf)
        value_T1, id_T1 = scores_TE.max(dim=1, keepdim=True)
        values.append(value_T1)
        ids.append(id_T1)
    return torch.cat(values, dim=1), torch.cat(ids, dim=1)


class LinearGate(torch.autograd.Function):
    """A linear router, its choice and its weights at one go: `apply(x_TD, weight_ED, k)` -> logits, ids, weights.

    [T, E], [T, K] and [T, K] as from `gate`; both the logits (for balance losses) and the weights have a gradient:

        dlogits += scatter of p * (dw - sum p dw),      dx = dlogits W,      dW = dlogits^T x
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, k: int) -> Any:
        """Compute logits, ids and weights."""
        logits_TE = torch.mm(x_TD, weight_ED.t())
        ids_TK, weights_TK = gate(logits_TE, k)
        ctx.save_for_backward(x_TD, weight_ED, ids_TK, weights_TK)
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)
        return logits_TE, ids_TK, weights_TK

    @staticmethod
    @first_order
    def backward(ctx: Any, dlogits_TE: Tensor | None, _dids: None, dw_TK: Tensor | None) -> Any:
        """Compute the gradients of input and weight; the weight's as `g^T x`, which is much faster than `(x^T g)^T`."""
        x_TD, weight_ED, ids_TK, p_TK = ctx.saved_tensors
        dlogits_TE = gate_logits_gradient(dlogits_TE, dw_TK, ids_TK, p_TK, weight_ED.shape[0])
        if dlogits_TE is None:
            return None, None, None
        need_x, need_weight, _ = ctx.needs_input_grad
        dx_TD = torch.mm(dlogits_TE, weight_ED) if need_x else None
        return dx_TD, torch.mm(dlogits_TE.t(), x_TD) if need_weight else None, None


def gate_logits_gradient(
    dlogits_TE: Tensor | None, dw_TK: Tensor | None, ids_TK: Tensor, p_TK: Tensor, num_experts: int
) -> Tensor | None:
    """Gradient of the logits behind a `gate`.

    Args:
        dlogits_TE: [T, E] gradient that reaches the logits themselves, or None.
        dw_TK: [T, K] gradient of the weights, or None.
        ids_TK: [T, K] chosen experts.
        p_TK: [T, K] their weights.
        num_experts: E.

    Returns:
        [T, E], or None without either.
    """
    if dw_TK is None:
        return dlogits_TE
    chosen_TK = p_TK * (dw_TK - (p_TK * dw_TK).sum(-1, keepdim=True))
    through_TE = p_TK.new_zeros(p_TK.shape[0], num_experts).scatter_(1, ids_TK, chosen_TK)
    return through_TE if dlogits_TE is None else through_TE.add_(dlogits_TE)
