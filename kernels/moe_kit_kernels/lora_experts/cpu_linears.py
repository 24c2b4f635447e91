"""Frozen linears with their experts in one dtype: the straight line through the dense implementation.

The same mathematics as `autograd.DenseLoraGroup` (see `cpu` for the equations) for what a training step calls most:
n linear layers over one input under one routing, all float32 or float64, all experts of one rank. At some hundred
tokens the general function's bookkeeping in Python costs as much as two of its GEMMs; here every line is one call.

A bank that keeps B as [E, L, O] (a parameter of shape [E, O, L] with the strides of its transpose) is never copied:
its B side by side, and the gradient of it, are views.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank, C = E*L columns of a projection, n projections.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kit_kernels.lora_experts import cpu, cpu_pairs
from moe_kit_kernels.lora_experts.frozen import hold_frozen, take_weight
from moe_kit_kernels.lora_experts.needs import Needs
from moe_kit_kernels.route_plan import RoutePlan
from moe_kit_kernels.topk_gate.cpu import gate, gate_logits_gradient


def fits(x_TD: Tensor, weights: Tensor, bases: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor]) -> bool:
    """Tell whether the straight line serves a call.

    Args:
        x_TD: inputs.
        weights: weights of the pairs.
        bases: base weights.
        A: down projections.
        B: up projections.

    Returns:
        True when all have one dtype, float32 or float64, and the experts one rank.
    """
    dtype, rank = x_TD.dtype, A[0].shape[1]
    if dtype not in (torch.float32, torch.float64) or weights.dtype != dtype:
        return False
    for w, a, b in zip(bases, A, B, strict=True):
        if w.dtype != dtype or a.dtype != dtype or b.dtype != dtype or a.shape[1] != rank:
            return False
    return True


def _joined(A: Sequence[Tensor]) -> Tensor:
    """[n*C, D]: the A of all projections one below the other; no copy for one."""
    return A[0].flatten(0, 1) if len(A) == 1 else torch.cat(A).flatten(0, 1)


def _side_by_side(B_EOL: Tensor) -> Tensor:
    """[O, C]: the experts' B side by side; a view of a bank that keeps B as [E, L, O]."""
    E, O, L = B_EOL.shape
    return B_EOL.permute(1, 0, 2).reshape(O, E * L)


def _factors(plan: RoutePlan | None, weights: Tensor, expand_EC: Tensor) -> Tensor:
    """[T, n*C] scale * weight, repeated over the rank."""
    if plan is None:
        return torch.mm(weights, expand_EC[:-1])
    return torch.mm(plan.gates_TE1(weights), expand_EC)


def forward(
    plan: RoutePlan | None,
    scale: float,
    x_TD: Tensor,
    weights: Tensor,
    bases: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    keep: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute the n results, and H of the chosen experts.

    Args:
        plan: the routing; None when every expert is chosen.
        scale: factor on the sums.
        x_TD: [T, D] inputs.
        weights: [T, K], [P] or [T, E].
        bases: base weights [O_i, D].
        biases: base biases [O_i] or None.
        A: down projections [E, L, D].
        B: up projections [E, O_i, L].
        keep: gather H for the backward.

    Returns:
        n results [T, O_i], and H [P * n, L] (or [T, n*C] when every expert is chosen), or ().
    """
    n, (E, L, _D) = len(A), A[0].shape
    H_TC = torch.mm(x_TD, _joined(A).t())
    expand_EC = cpu.expansion(E, (L,) * n, scale, x_TD.dtype, x_TD.device)
    factors_TC = _factors(plan, weights, expand_EC)
    kept: tuple[Tensor, ...] = ()
    if keep:
        kept = (H_TC if plan is None else H_TC.view(-1, L).index_select(0, cpu.chosen_rows(plan, n)),)
    G_TC = H_TC * factors_TC if keep and plan is None else H_TC.mul_(factors_TC)
    parts = (G_TC,) if n == 1 else G_TC.split(E * L, dim=1)
    results = []
    for part_TC, base_OD, bias_O, b_EOL in zip(parts, bases, biases, B, strict=True):
        y_TO = torch.nn.functional.linear(x_TD, base_OD, bias_O)
        results.append(y_TO.addmm_(part_TC, _side_by_side(b_EOL).t()))
    return tuple(results), kept


def backward(
    plan: RoutePlan | None,
    scale: float,
    needs: Needs,
    x_TD: Tensor,
    weights: Tensor,
    kept: Sequence[Tensor],
    bases: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    dys: Sequence[Tensor],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Compute the gradients that are asked for.

    Args:
        plan: the routing.
        scale: factor on the sums.
        needs: which gradients.
        x_TD: [T, D] inputs.
        weights: the forward's weights.
        kept: H as `forward` gave it.
        bases: base weights; read only for the gradient of x.
        A: down projections.
        B: up projections.
        dys: gradients of the n results.

    Returns:
        Gradients of x, of the weights, and of the n bases, biases, A and B.
    """
    n = len(dys)
    need_base, need_bias, need_A, need_B = (needs.tensors[i * n : (i + 1) * n] for i in range(4))
    (T, D), (E, L, _) = x_TD.shape, A[0].shape
    C = E * L
    expand_EC = cpu.expansion(E, (L,) * n, scale, x_TD.dtype, x_TD.device)
    factors_TC = _factors(plan, weights, expand_EC)
    dx = dweights = None
    dA: Sequence[Tensor | None] = (None,) * n
    dB: list[Tensor | None] = [None] * n

    if needs.x or needs.weights or any(need_A):
        if n == 1:
            U_TC = torch.mm(dys[0], _side_by_side(B[0]))
        else:
            U_TC = x_TD.new_empty(T, n * C)
            for dy_TO, b_EOL, out in zip(dys, B, U_TC.split(C, dim=1), strict=True):
                torch.mm(dy_TO, _side_by_side(b_EOL), out=out)
    if kept:
        (H_TC,) = kept
        if plan is not None:
            # columns of experts that were not chosen stay 0
            rows = H_TC.new_zeros(T * n * E, L)
            H_TC = rows.index_copy_(0, cpu.chosen_rows(plan, n), H_TC).view(T, n * C)
        if needs.weights:
            dweights = cpu.gate_gradient(U_TC, H_TC, expand_EC, plan, weights)
        if any(need_B):
            G_TC = H_TC * factors_TC if plan is None else H_TC.mul_(factors_TC)
            for i, (dy_TO, part_TC) in enumerate(zip(dys, G_TC.split(C, dim=1), strict=True)):
                if need_B[i]:
                    # a view in the layout of a bank that keeps B as [E, L, O]: autograd takes it without a copy
                    dB[i] = torch.mm(part_TC.t(), dy_TO).view(E, L, -1).transpose(1, 2)
    if needs.x or any(need_A):
        dH_TC = U_TC.mul_(factors_TC)
        if any(need_A):
            dA = torch.mm(dH_TC.t(), x_TD).view(n * E, L, D).split(E)
        if needs.x:
            for dy_TO, w_OD in zip(dys, bases, strict=True):
                dx = torch.mm(dy_TO, w_OD) if dx is None else dx.addmm_(dy_TO, w_OD)
            dx.addmm_(dH_TC, _joined(A))
    dbase = [dy_TO.t() @ x_TD if need else None for dy_TO, need in zip(dys, need_base, strict=True)]
    dbias = [dy_TO.sum(0) if need else None for dy_TO, need in zip(dys, need_bias, strict=True)]
    return dx, dweights, [*dbase, *dbias, *dA, *dB]


def _form(how: str) -> Any:
    """The module whose `forward` and `backward` compute a form."""
    return cpu_pairs if how == "sorted" else sys.modules[__name__]


class RoutedLinears(torch.autograd.Function):
    """`apply(how, plan, scale, x_TD, weights, *bases, *biases, *A, *B)` -> tuple of n results [T, O_i].

    `how` is "dense" (this module) or "sorted" (`cpu_pairs`).
    """

    @staticmethod
    def forward(
        ctx: Any, how: str, plan: RoutePlan | None, scale: float, x_TD: Tensor, weights: Tensor, *tensors: Tensor | None
    ) -> Any:
        """Compute the base products and add the experts."""
        n = len(tensors) // 4
        bases, A, B = tensors[:n], tensors[2 * n : 3 * n], tensors[3 * n :]
        _, _, _, need_x, need_weights, *others = ctx.needs_input_grad
        needs = Needs(need_x, need_weights, tuple(others))
        results, kept = _form(how).forward(plan, scale, x_TD, weights, bases, tensors[n : 2 * n], A, B, needs.hidden)
        held = [hold_frozen(w, need_x) for w in bases]
        ctx.call, ctx.needs, ctx.frozen = (how, plan, scale), needs, [frozen for frozen, _ in held]
        ctx.save_for_backward(x_TD, weights, *A, *B, *(trained for _, trained in held), *kept)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        """Compute the gradients that are asked for."""
        n, (how, plan, scale) = len(dys), ctx.call
        x_TD, weights, *saved = ctx.saved_tensors
        A, B, bases = saved[:n], saved[n : 2 * n], _bases(ctx.frozen, saved[2 * n : 3 * n], ctx.needs.x)
        dx, dweights, others = _form(how).backward(
            plan, scale, ctx.needs, x_TD, weights, saved[3 * n :], bases, A, B, dys
        )
        return None, None, None, dx, dweights, *others


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
        n = len(tensors) // 4
        bases, A, B = tensors[:n], tensors[2 * n : 3 * n], tensors[3 * n :]
        _, _, _, need_x, need_router, *others = ctx.needs_input_grad
        # the weights depend on x and on the router
        needs = Needs(need_x, need_x or need_router, tuple(others))
        logits_TE = torch.mm(x_TD, router_ED.t())
        ids_TK, weights_TK = gate(logits_TE, k)
        # the gate's own ids need no check
        plan = RoutePlan(ids_TK.reshape(-1), x_TD.shape[0], router_ED.shape[0], k)
        results, kept = _form(how).forward(plan, scale, x_TD, weights_TK, bases, tensors[n : 2 * n], A, B, needs.hidden)
        held = [hold_frozen(w, need_x) for w in bases]
        ctx.call, ctx.needs, ctx.frozen = (how, plan, scale), needs, [frozen for frozen, _ in held]
        ctx.mark_non_differentiable(ids_TK)
        # a loss may or may not read logits and weights, and a result may go unused
        ctx.set_materialize_grads(False)
        ctx.widths = [result.shape for result in results]
        trained = [value for _, value in held]
        ctx.save_for_backward(x_TD, router_ED, weights_TK, ids_TK, *A, *B, *trained, *kept)
        return logits_TE, ids_TK, weights_TK, *results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor | None, _dids: None, dw_TK: Tensor | None, *dys: Tensor | None) -> Any:
        """Compute the gradients that are asked for."""
        n, (how, plan, scale) = len(dys), ctx.call
        x_TD, router_ED, p_TK, ids_TK, *saved = ctx.saved_tensors
        dx = None
        others: list[Tensor | None] = [None] * (4 * n)
        if any(dy is not None for dy in dys):
            dys = [x_TD.new_zeros(shape) if dy is None else dy for dy, shape in zip(dys, ctx.widths, strict=True)]
            A, B, bases = saved[:n], saved[n : 2 * n], _bases(ctx.frozen, saved[2 * n : 3 * n], ctx.needs.x)
            dx, inner_TK, others = _form(how).backward(
                plan, scale, ctx.needs, x_TD, p_TK, saved[3 * n :], bases, A, B, dys
            )
            if inner_TK is not None:
                dw_TK = inner_TK if dw_TK is None else dw_TK + inner_TK
        dlogits = gate_logits_gradient(dlogits, dw_TK, ids_TK, p_TK, router_ED.shape[0])
        drouter = None
        if dlogits is not None:
            if ctx.needs.x:
                dx = torch.mm(dlogits, router_ED) if dx is None else dx.addmm_(dlogits, router_ED)
            if ctx.needs_input_grad[4]:
                drouter = torch.mm(dlogits.t(), x_TD)
        return None, None, None, dx, drouter, *others


def _bases(frozen: Sequence[Any], trained: Sequence[Tensor | None], needed: bool) -> list[Tensor]:
    """The base weights, where the gradient of x reads them."""
    return [take_weight(f, t) for f, t in zip(frozen, trained, strict=True)] if needed else []
