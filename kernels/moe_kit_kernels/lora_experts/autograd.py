"""Autograd of LoRA experts on the dense implementation: one function for lora_experts and lora_linear.

For n projections i that share x and the routing:

    y_i = base_i + scale * sum_k w_k B_i,e A_i,e x,     base_i = given, or x W_i^T + bias_i computed here

Computing the base inside writes y once and accumulates dx = sum_i dy_i W_i + dH A without a separate addition.
Kept for the backward: x (shared with the caller), H of the chosen experts [P, L], the weights, the plan's ids, and
the parameters. Nothing of size P*O, P*D or T*E*L.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank, C = sum of E*L over projections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.lora_experts import cpu
from moe_kit_kernels.lora_experts.frozen import hold_frozen, take_weight
from moe_kit_kernels.route_plan import RoutePlan


@dataclass(frozen=True, slots=True)
class Group:
    """What n projections over one x and one routing have in common; not a tensor in it but the plan's."""

    plan: RoutePlan | None
    """The routing; None when every expert is chosen and the weights are [T, E]."""
    scale: float
    """Factor on the adapters' sum."""
    projections: int
    """n."""
    linear: bool
    """True: `bases` are frozen weights [O, D] and the base product is computed here. False: they are results [T, O] or None."""
    overwrite_base: bool = False
    """The caller owns the base results and lets them be overwritten."""


def _gate_dtype(weights: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which H is weighed: float32 at least, and as wide as H."""
    return torch.promote_types(weights.dtype, torch.promote_types(dtype, torch.float32))


def dense_forward(
    group: Group, x_TD: Tensor, weights: Tensor, tensors: Sequence[Tensor | None], *, keep: bool
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Compute the n results; plain PyTorch, for use inside an autograd function or without gradients.

    Args:
        group: what the projections share.
        x_TD: [T, D] inputs.
        weights: weights of the pairs, or [T, E].
        tensors: bases, biases, A and B, n of each in this order.
        keep: gather H of the chosen experts for the backward.

    Returns:
        The results [T, O_i], and the tensors of H to keep.
    """
    n = group.projections
    bases, biases, A, B = tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n :]
    dtype = torch.promote_types(x_TD.dtype, A[0].dtype)
    ranks = tuple(a.shape[1] for a in A)
    E = A[0].shape[0]
    H_TC = x_TD.to(dtype) @ cpu.join_down(A, dtype).t()
    kept = cpu.keep_chosen(H_TC, group.plan, ranks) if keep else ()
    if kept and kept[0] is H_TC:
        H_TC = H_TC.clone()
    expand_EC = cpu.expansion(E, ranks, group.scale, _gate_dtype(weights, dtype), x_TD.device)
    G_TC = cpu.weigh(H_TC, cpu.gates(group.plan, weights).to(expand_EC.dtype), expand_EC)

    results = []
    column = 0
    for base, bias, b_EOL in zip(bases, biases, B, strict=True):
        width = E * b_EOL.shape[2]
        part_TC = G_TC if n == 1 else G_TC[:, column : column + width]
        column += width
        if base is None:
            results.append(cpu.add_up(None, part_TC, b_EOL, owned=True).to(x_TD.dtype))
            continue
        if group.linear:
            base_TO, owned = torch.nn.functional.linear(x_TD, base, bias), True
        else:
            base_TO, owned = base, group.overwrite_base
        if base_TO.dtype == dtype:
            results.append(cpu.add_up(base_TO, part_TC, b_EOL, owned=owned))
            continue
        # adapters wider than the base: the sum is rounded once
        sum_TO = cpu.add_up(None, part_TC, b_EOL, owned=True).add_(base_TO)
        results.append(base_TO.copy_(sum_TO) if owned else sum_TO.to(base_TO.dtype))
    return results, kept


def dense_backward(
    group: Group,
    x_TD: Tensor,
    weights: Tensor,
    bases_OD: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    kept: tuple[Tensor, ...],
    dys: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients that are asked for.

    Args:
        group: what the projections share.
        x_TD: [T, D] inputs.
        weights: the forward's weights.
        bases_OD: base weights, for linear groups whose x wants a gradient; else empty.
        A: down projections.
        B: up projections.
        kept: H as `dense_forward` gave it.
        dys: gradients of the n results.
        needs: which of x, weights, n bases, n biases, n A and n B want a gradient.

    Returns:
        Gradients in the order of `needs`, None where not wanted.
    """
    n, plan = group.projections, group.plan
    need_x, need_weights = needs[0], needs[1]
    need_base, need_bias = needs[2 : 2 + n], needs[2 + n : 2 + 2 * n]
    need_A, need_B = needs[2 + 2 * n : 2 + 3 * n], needs[2 + 3 * n :]

    dtype = torch.promote_types(x_TD.dtype, A[0].dtype)
    ranks = tuple(a.shape[1] for a in A)
    E, C = A[0].shape[0], A[0].shape[0] * sum(ranks)
    columns = [E * rank for rank in ranks]
    gate_dtype = _gate_dtype(weights, dtype)
    expand_EC = cpu.expansion(E, ranks, group.scale, gate_dtype, x_TD.device)
    factors_TC = cpu.gates(plan, weights).to(gate_dtype) @ expand_EC[:E]
    dycs = [dy.to(dtype) for dy in dys]

    dx = dweights = None
    dA: list[Tensor | None] = [None] * n
    dB: list[Tensor | None] = [None] * n

    if need_x or need_weights or any(need_A):
        U_TC = x_TD.new_empty(x_TD.shape[0], C, dtype=dtype)
        for dy_TO, b_EOL, out in zip(dycs, B, U_TC.split(columns, dim=1), strict=True):
            cpu.project(dy_TO, b_EOL, out)
    if kept:
        H_TC = cpu.spread_chosen(kept, plan, ranks)
        if need_weights:
            dweights = cpu.gate_gradient(U_TC, H_TC, expand_EC, plan, weights).to(weights.dtype)
        if any(need_B):
            # without a plan H is the saved tensor itself and must stay as it is
            fresh = plan is not None and H_TC.dtype == factors_TC.dtype
            G_TC = H_TC.mul_(factors_TC) if fresh else (H_TC * factors_TC).to(dtype)
            parts = [G_TC] if n == 1 else G_TC.split(columns, dim=1)
            for i, (dy_TO, part_TC) in enumerate(zip(dycs, parts, strict=True)):
                if need_B[i]:
                    dB[i] = cpu.up_gradient(dy_TO, part_TC, B[i])
    if need_x or any(need_A):
        dH_TC = U_TC.mul_(factors_TC) if U_TC.dtype == factors_TC.dtype else (U_TC * factors_TC).to(dtype)
        if any(need_A):
            dA_CD = dH_TC.t() @ x_TD.to(dtype)
            blocks = [dA_CD] if n == 1 else dA_CD.split(columns)
            dA = [block.view_as(a).to(a.dtype) for block, a in zip(blocks, A, strict=True)]
    if need_x:
        for dy_TO, w_OD in zip(dys, bases_OD, strict=False):
            dy_TO = dy_TO.to(w_OD.dtype)
            dx = dy_TO @ w_OD if dx is None else dx.addmm_(dy_TO, w_OD)
        A_CD = cpu.join_down(A, dtype)
        if dx is not None and dx.dtype == dtype:
            dx.addmm_(dH_TC, A_CD)
        else:
            delta_TD = dH_TC @ A_CD
            dx = (delta_TD if dx is None else delta_TD.add_(dx)).to(x_TD.dtype)

    dbase: list[Tensor | None] = [None] * n
    dbias: list[Tensor | None] = [None] * n
    for i, dy_TO in enumerate(dys):
        if need_base[i]:
            dbase[i] = dy_TO.t() @ x_TD.to(dy_TO.dtype) if group.linear else dy_TO
        if need_bias[i]:
            dbias[i] = dy_TO.sum(0)
    return dx, dweights, *dbase, *dbias, *dA, *dB


class DenseLoraGroup(torch.autograd.Function):
    """n projections as plain GEMMs; see the module's docstring.

    `apply(group, x_TD, weights, *bases, *biases, *A, *B)` -> tuple of n results [T, O_i].
    """

    @staticmethod
    def forward(ctx: Any, group: Group, x_TD: Tensor, weights: Tensor, *tensors: Tensor | None) -> Any:
        """Compute the n results."""
        n = group.projections
        A, B = tensors[2 * n : 3 * n], tensors[3 * n :]
        needs = ctx.needs_input_grad
        # H is read by the gradients of the weights and of B only
        keep = needs[2] or any(needs[3 + 3 * n :])
        results, kept = dense_forward(group, x_TD, weights, tensors, keep=keep)
        bases = tensors[:n]
        dirty = [base for base in bases if base is not None] if group.overwrite_base else []
        if dirty:
            ctx.mark_dirty(*dirty)

        held = [hold_frozen(w if group.linear else None, needs[1]) for w in bases]
        ctx.group, ctx.frozen = group, [frozen for frozen, _ in held]
        ctx.save_for_backward(x_TD, weights, *(trained for _, trained in held), *A, *B, *kept)
        return tuple(results)

    @staticmethod
    @first_order
    def backward(ctx: Any, *dys: Tensor) -> Any:
        """Compute the gradients that are asked for."""
        n = ctx.group.projections
        x_TD, weights, *saved = ctx.saved_tensors
        trained, A, B, kept = saved[:n], saved[n : 2 * n], saved[2 * n : 3 * n], tuple(saved[3 * n :])
        linear = ctx.group.linear
        bases = (
            [take_weight(f, t) for f, t in zip(ctx.frozen, trained, strict=True)]
            if linear and ctx.needs_input_grad[1]
            else []
        )
        return None, *dense_backward(ctx.group, x_TD, weights, bases, A, B, kept, dys, ctx.needs_input_grad[1:])
