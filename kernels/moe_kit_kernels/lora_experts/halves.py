"""The two halves of routed LoRA experts, each with its own backward, for callers that change H in between.

    down: H_p = A_e(p) x_t(p)            dA = dHd^T x,  dx = dHd A,   dHd = dH spread over [T, E*L]
    up:   y_t = base_t + scale * sum_p w_p B_e(p) H_p
          U = dy B,  dH_p = scale * w_p * U_p,  dw_p = scale * <U_p, H_p>,  dB_e = dy^T (scale * w * H)_e

Pairs are gathered from and spread to the columns of all experts; repeated pairs add up.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank, C = sum of E*L over projections.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kit_kernels.lora_experts import cpu
from moe_kit_kernels.route_plan import RoutePlan


def _spread_sum(pairs_PL: Tensor, plan: RoutePlan) -> Tensor:
    """[P, L] -> [T, E*L], adding repeated pairs up; dropped pairs must hold 0."""
    L = pairs_PL.shape[1]
    rows = pairs_PL.new_zeros(plan.num_tokens * plan.num_experts, L)
    rows.scatter_add_(0, cpu.chosen_rows(plan, 1)[:, None].expand(-1, L), pairs_PL)
    return rows.view(plan.num_tokens, plan.num_experts * L)


def _gather(columns_TC: Tensor, plan: RoutePlan, L: int) -> Tensor:
    return columns_TC.reshape(-1, L).index_select(0, cpu.chosen_rows(plan, 1))


def _kept(plan: RoutePlan, dtype: torch.dtype) -> Tensor:
    """[P, 1] ones, zeros for dropped pairs."""
    return (plan.expert_P < plan.num_experts).to(dtype)[:, None]


class DenseDown(torch.autograd.Function):
    """`apply(plan, x_TD, *A)` -> tuple of [P, L]."""

    @staticmethod
    def forward(ctx: Any, plan: RoutePlan, x_TD: Tensor, *A: Tensor) -> Any:
        """Gather the chosen columns of one GEMM with all A."""
        dtype = torch.promote_types(x_TD.dtype, A[0].dtype)
        H_TC = x_TD.to(dtype) @ cpu.join_down(list(A), dtype).t()
        columns = [a.shape[0] * a.shape[1] for a in A]
        kept_P1 = _kept(plan, dtype)
        ctx.plan = plan
        ctx.save_for_backward(x_TD, *A)
        return tuple(
            _gather(part, plan, a.shape[1]).mul_(kept_P1) for part, a in zip(H_TC.split(columns, dim=1), A, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dHs: Tensor) -> Any:
        """Spread dH over the columns, then two GEMMs."""
        x_TD, *A = ctx.saved_tensors
        dtype = dHs[0].dtype
        kept_P1 = _kept(ctx.plan, dtype)
        parts = [_spread_sum(dH_PL * kept_P1, ctx.plan) for dH_PL in dHs]
        dH_TC = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        dx = (dH_TC @ cpu.join_down(A, dtype)).to(x_TD.dtype) if ctx.needs_input_grad[1] else None
        dA: list[Tensor | None] = [None] * len(A)
        if any(ctx.needs_input_grad[2:]):
            dA_CD = dH_TC.t() @ x_TD.to(dtype)
            columns = [a.shape[0] * a.shape[1] for a in A]
            dA = [part.view_as(a).to(a.dtype) for part, a in zip(dA_CD.split(columns), A, strict=True)]
        return None, dx, *dA


class DenseUp(torch.autograd.Function):
    """`apply(plan, scale, H_PL, B_EOL, weights, base_TO)` -> [T, O]."""

    @staticmethod
    def forward(
        ctx: Any, plan: RoutePlan, scale: float, H_PL: Tensor, B_EOL: Tensor, weights: Tensor, base_TO: Tensor | None
    ) -> Tensor:
        """Weigh in rank space, spread over the columns, one GEMM with all B."""
        dtype = torch.promote_types(H_PL.dtype, B_EOL.dtype)
        factor_P1 = weights.reshape(-1, 1) * _kept(plan, weights.dtype) * scale
        G_TC = _spread_sum((H_PL * factor_P1).to(dtype), plan)
        Bt_CO = cpu.join_up(B_EOL, dtype).t()
        ctx.plan, ctx.scale, ctx.has_base = plan, scale, base_TO is not None
        ctx.save_for_backward(H_PL, B_EOL, weights)
        if base_TO is None:
            return (G_TC @ Bt_CO).to(H_PL.dtype)
        if base_TO.dtype == dtype:
            return torch.addmm(base_TO, G_TC, Bt_CO)
        return (G_TC @ Bt_CO).add_(base_TO).to(base_TO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        """One GEMM with all B, then everything in rank space, then one GEMM for dB."""
        H_PL, B_EOL, weights = ctx.saved_tensors
        plan = ctx.plan
        E, O, L = B_EOL.shape
        dtype = torch.promote_types(H_PL.dtype, B_EOL.dtype)
        dyc_TO = dy_TO.to(dtype)
        _, _, need_H, need_B, need_weights, need_base = ctx.needs_input_grad
        factor_P1 = weights.reshape(-1, 1) * _kept(plan, weights.dtype) * ctx.scale
        dH = dB = dweights = None
        if need_H or need_weights:
            U_PL = _gather(dyc_TO @ cpu.join_up(B_EOL, dtype), plan, L).to(factor_P1.dtype)
            if need_weights:
                kept_P1 = _kept(plan, weights.dtype)
                dweights = ((U_PL * H_PL).sum(-1, keepdim=True) * kept_P1 * ctx.scale).view_as(weights)
            if need_H:
                dH = U_PL.mul_(factor_P1).to(H_PL.dtype)
        if need_B:
            G_TC = _spread_sum((H_PL * factor_P1).to(dtype), plan)
            dB = (dyc_TO.t() @ G_TC).view(O, E, L).permute(1, 0, 2).to(B_EOL.dtype).contiguous()
        return None, None, dH, dB, dweights, dy_TO if need_base else None


def down_traced(x_TD: Tensor, A_ELD: Tensor, plan: RoutePlan) -> Tensor:
    """Down half in plain operations, for torch.compile to trace and differentiate.

    Args:
        x_TD: [T, D] inputs.
        A_ELD: [E, L, D].
        plan: the routing.

    Returns:
        [P, L] in the given order, 0 for dropped pairs.
    """
    E, L, _ = A_ELD.shape
    T = plan.num_tokens
    dtype = torch.promote_types(x_TD.dtype, A_ELD.dtype)
    H_TC = x_TD.to(dtype) @ A_ELD.flatten(0, 1).to(dtype).t()
    expert_P = plan.expert_P.clamp(max=E - 1)
    if plan.slots is not None:
        index = expert_P.view(T, plan.slots, 1).expand(T, plan.slots, L)
        H_PL = H_TC.view(T, E, L).gather(1, index).reshape(T * plan.slots, L)
    else:
        H_PL = H_TC.view(T * E, L).index_select(0, plan.token_P * E + expert_P)
    return H_PL * _kept(plan, dtype)


def up_traced(
    H_PL: Tensor, B_EOL: Tensor, plan: RoutePlan, weights: Tensor, scale: float, base_TO: Tensor | None
) -> Tensor:
    """Up half in plain operations, for torch.compile to trace and differentiate.

    Args:
        H_PL: [P, L] in the given order.
        B_EOL: [E, O, L].
        plan: the routing.
        weights: [T, K] or [P].
        scale: factor on the sum.
        base_TO: [T, O] or None.

    Returns:
        [T, O] in the dtype of the base, else of H.
    """
    E, O, L = B_EOL.shape
    T = plan.num_tokens
    dtype = torch.promote_types(H_PL.dtype, B_EOL.dtype)
    G_PL = (H_PL * (weights.reshape(-1, 1) * _kept(plan, weights.dtype) * scale)).to(dtype)
    expert_P = plan.expert_P.clamp(max=E - 1)
    if plan.slots is not None:
        index = expert_P.view(T, plan.slots, 1).expand(T, plan.slots, L)
        G_TC = G_PL.new_zeros(T, E, L).scatter_add(1, index, G_PL.view(T, plan.slots, L)).view(T, E * L)
    else:
        G_TC = G_PL.new_zeros(T * E, L).index_add(0, plan.token_P * E + expert_P, G_PL).view(T, E * L)
    y_TO = G_TC @ B_EOL.to(dtype).permute(0, 2, 1).reshape(E * L, O)
    return y_TO.to(H_PL.dtype) if base_TO is None else (base_TO + y_TO).to(base_TO.dtype)
