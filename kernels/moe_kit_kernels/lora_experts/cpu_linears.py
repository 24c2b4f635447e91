"""Frozen linears with their experts in one operator: base products here, experts in one of three forms.

    y_i = x W_i^T + bias_i + scale * sum_k w_k B_i,e A_i,e x        for n projections i that share x and the routing

The forms (`forms`) add into y and into dx where the base products have written them. On a half-precision base with float32 experts
the base products are half, all else is float32, and y and dx are rounded once.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank, n projections.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.lora_experts import cpu_columns
from moe_kit_kernels.lora_experts.call import Call, Needs
from moe_kit_kernels.lora_experts.forms import FORMS
from moe_kit_kernels.lora_experts.frozen import hold_frozen, take_weight
from moe_kit_kernels.route_plan import RoutePlan
from moe_kit_kernels.topk_gate.cpu import gate, gate_logits_gradient


def fits(x_TD: Tensor, weights: Tensor, bases: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor]) -> bool:
    """Tell whether this module serves a call.

    Args:
        x_TD: inputs.
        weights: weights of the pairs.
        bases: base weights.
        A: down projections.
        B: up projections.

    Returns:
        True when the experts have one rank and one dtype, float32 or float64, and x and the bases the same one, or a half
        one beside float32.
    """
    rank, dtype = A[0].shape[1], x_TD.dtype
    alike = dtype is weights.dtype or (dtype in _HALVES and weights.dtype is torch.float32)
    return (
        alike
        and cpu_columns.one_dtype(weights, *A, *B)
        and all(w.dtype is dtype for w in bases)
        and all(a.shape[1] == rank for a in A)
    )


_HALVES = (torch.bfloat16, torch.float16)


def forward(
    how: str,
    plan: RoutePlan | None,
    scale: float,
    x_TD: Tensor,
    weights: Tensor,
    tensors: Sequence[Tensor | None],
    keep: bool,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Compute the n results.

    Args:
        how: "dense", "sorted" or "native".
        plan: the routing; None when every expert is chosen.
        scale: factor on the sums.
        x_TD: [T, D] inputs.
        weights: [T, K], [P] or [T, E].
        tensors: n base weights [O_i, D], biases [O_i] or None, A [E, L, D] and B [E, O_i, L].
        keep: return H for the backward.

    Returns:
        n results [T, O_i], and H as the form keeps it, or ().
    """
    bases, biases, A, B = _quarters(tensors)
    given, dtype = x_TD.dtype, weights.dtype
    # to its own dtype a tensor is not copied
    results = [
        torch.nn.functional.linear(x_TD, w_OD, bias_O).to(dtype) for w_OD, bias_O in zip(bases, biases, strict=True)
    ]
    results, kept = FORMS[how].add(Call(plan, scale, x_TD.to(dtype), weights, A, B), results, keep=keep)
    return [result.to(given) for result in results] if given is not dtype else results, kept


def _backward(
    ctx: Any, x_TD: Tensor, weights: Tensor, saved: Sequence[Tensor | None], dys: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x, of the weights, and of the n bases, biases, A and B."""
    n, (how, plan, scale), needs = len(dys), ctx.call, ctx.needs
    A, B, trained, kept = saved[:n], saved[n : 2 * n], saved[2 * n : 3 * n], saved[3 * n :]
    need_base, need_bias, _, _ = _quarters(ctx.needs_input_grad[-4 * n :])
    dx = None
    if needs.x:
        for dy_TO, frozen, weight in zip(dys, ctx.frozen, trained, strict=True):
            w_OD = take_weight(frozen, weight)
            if dx is None:
                dx = torch.mm(dy_TO, w_OD).to(weights.dtype)
            elif dx.dtype is dy_TO.dtype:
                dx.addmm_(dy_TO, w_OD)
            else:
                dx += torch.mm(dy_TO, w_OD)
    call = Call(plan, scale, x_TD.to(weights.dtype), weights, A, B)
    wide = [dy_TO.to(weights.dtype) for dy_TO in dys]
    dx, dweights, dA, dB = FORMS[how].gradients(call, needs, kept, wide, dx)
    dbase = [dy_TO.t() @ x_TD if need else None for dy_TO, need in zip(dys, need_base, strict=True)]
    dbias = [dy_TO.sum(0) if need else None for dy_TO, need in zip(dys, need_bias, strict=True)]
    return dx, dweights, [*dbase, *dbias, *dA, *dB]


def _forward(
    ctx: Any,
    call: tuple[str, RoutePlan | None, float],
    needs: Needs,
    x_TD: Tensor,
    weights: Tensor,
    tensors: Sequence[Tensor | None],
    *others: Tensor,
) -> list[Tensor]:
    """Compute the results and keep what `_backward` reads behind `x_TD` and `others`."""
    bases, _, A, B = _quarters(tensors)
    results, kept = forward(*call, x_TD, weights, tensors, needs.hidden)
    held = [hold_frozen(w, needs.x) for w in bases]
    ctx.call, ctx.needs, ctx.frozen = call, needs, [frozen for frozen, _ in held]
    ctx.save_for_backward(x_TD, *others, *A, *B, *(trained for _, trained in held), *kept)
    return results


def _quarters(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any], Sequence[Any]]:
    """What belongs to the n bases, the n biases, the n A and the n B."""
    n = len(values) // 4
    return values[:n], values[n : 2 * n], values[2 * n : 3 * n], values[3 * n :]


def gated_forward(
    how: str, k: int, scale: float, x_TD: Tensor, router_ED: Tensor, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Choose and compute without a graph.

    Args:
        how: "dense", "sorted" or "native".
        k: K.
        scale: factor on the sums.
        x_TD: [T, D] inputs.
        router_ED: [E, D] weight of the router.
        tensors: as for `forward`.

    Returns:
        What `GatedLinears` gives.
    """
    logits_TE, ids_TK, weights_TK, plan = _decide(x_TD, router_ED, k)
    return logits_TE, ids_TK, weights_TK, *forward(how, plan, scale, x_TD, weights_TK, tensors, False)[0]


def _decide(x_TD: Tensor, router_ED: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, RoutePlan]:
    """Logits, ids, weights and plan of a linear router."""
    logits_TE = torch.mm(x_TD.to(router_ED.dtype), router_ED.t())
    ids_TK, weights_TK = gate(logits_TE, k)
    # the gate's own ids need no check
    return logits_TE, ids_TK, weights_TK, RoutePlan(ids_TK.reshape(-1), x_TD.shape[0], router_ED.shape[0], k)


class RoutedLinears(torch.autograd.Function):
    """`apply(how, plan, scale, x_TD, weights, *bases, *biases, *A, *B)` -> tuple of n results [T, O_i]."""

    @staticmethod
    def forward(
        ctx: Any, how: str, plan: RoutePlan | None, scale: float, x_TD: Tensor, weights: Tensor, *tensors: Tensor | None
    ) -> Any:
        """Compute the base products and add the experts."""
        _, _, _, need_x, need_weights, *others = ctx.needs_input_grad
        _, _, need_A, need_B = _quarters(tuple(others))
        needs = Needs(need_x, need_weights, need_A, need_B)
        return tuple(_forward(ctx, (how, plan, scale), needs, x_TD, weights, tensors, weights))

    @staticmethod
    @first_order
    def backward(ctx: Any, *dys: Tensor) -> Any:
        """Compute the gradients that are asked for."""
        x_TD, weights, *saved = ctx.saved_tensors
        dx, dweights, others = _backward(ctx, x_TD, weights, saved, dys)
        return None, None, None, None if dx is None else dx.to(x_TD.dtype), dweights, *others


class GatedLinears(torch.autograd.Function):
    """A linear router and the linears that it routes, at one go.

    `apply(how, k, scale, x_TD, router_ED, *bases, *biases, *A, *B)` -> logits [T, E], ids [T, K], weights [T, K], and
    n results [T, O_i]; `how` as in `RoutedLinears`. The choice is that of `topk_gate.cpu.gate`. The gradient that
    reaches x through the router is added where the one through the linears already lies: on its own it is a second
    tensor of x's size, and a sum.
    """

    @staticmethod
    def forward(
        ctx: Any, how: str, k: int, scale: float, x_TD: Tensor, router_ED: Tensor, *tensors: Tensor | None
    ) -> Any:
        """Choose, compute the base products and add the experts."""
        _, _, _, need_x, need_router, *others = ctx.needs_input_grad
        _, _, need_A, need_B = _quarters(tuple(others))
        # the weights depend on x and on the router
        needs = Needs(need_x, need_x or need_router, need_A, need_B)
        logits_TE, ids_TK, weights_TK, plan = _decide(x_TD, router_ED, k)
        inputs = (router_ED, weights_TK, ids_TK)
        results = _forward(ctx, (how, plan, scale), needs, x_TD, weights_TK, tensors, *inputs)
        ctx.mark_non_differentiable(ids_TK)
        # a loss may or may not read logits and weights, and a result may go unused
        ctx.set_materialize_grads(False)
        ctx.widths = [result.shape for result in results]
        return logits_TE, ids_TK, weights_TK, *results

    @staticmethod
    @first_order
    def backward(ctx: Any, dlogits: Tensor | None, _dids: None, dw_TK: Tensor | None, *dys: Tensor | None) -> Any:
        """Compute the gradients that are asked for."""
        x_TD, router_ED, p_TK, ids_TK, *saved = ctx.saved_tensors
        dx = None
        others: list[Tensor | None] = [None] * (4 * len(dys))
        if any(dy is not None for dy in dys):
            dys = [x_TD.new_zeros(shape) if dy is None else dy for dy, shape in zip(dys, ctx.widths, strict=True)]
            dx, inner_TK, others = _backward(ctx, x_TD, p_TK, saved, dys)
            if inner_TK is not None:
                dw_TK = inner_TK if dw_TK is None else dw_TK + inner_TK
        dlogits = gate_logits_gradient(dlogits, dw_TK, ids_TK, p_TK, router_ED.shape[0])
        drouter = None
        if dlogits is not None:
            if ctx.needs.x:
                dx = torch.mm(dlogits, router_ED) if dx is None else dx.addmm_(dlogits, router_ED)
            if ctx.needs_input_grad[4]:
                drouter = torch.mm(dlogits.t(), x_TD.to(dlogits.dtype))
        return None, None, None, None if dx is None else dx.to(x_TD.dtype), drouter, *others
