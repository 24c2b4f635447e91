"""The down and up products of LoRA experts in plain PyTorch: one GEMM over the columns of all experts, on every device.

Pairs are gathered from and spread to the columns; repeated pairs add up. Free pairs work like tables.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank, C = sum of E*L over projections.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def dropped_pairs(plan: RoutePlan) -> Tensor:
    """Tell which pairs were dropped; what they hold is masked, not multiplied by 0: it may be NaN.

    Args:
        plan: The routing.

    Returns:
        [P, 1] bool.
    """
    return (plan.expert_P == plan.num_experts)[:, None]


def down(x_TD: Tensor, A: Sequence[Tensor], plan: RoutePlan) -> list[Tensor]:
    """Gather the chosen columns of one GEMM with all A.

    Args:
        x_TD: [T, D].
        A: Stacks [E, L_i, D].
        plan: The routing.

    Returns:
        [P, L_i] in the given order, 0 for dropped pairs, one a stack.
    """
    dtype = torch.promote_types(x_TD.dtype, A[0].dtype)
    H_TC = x_TD.to(dtype) @ cpu.join_down(list(A), dtype).t()
    dropped_P1 = dropped_pairs(plan)
    parts = H_TC.split([a.shape[0] * a.shape[1] for a in A], dim=1)
    return [_gather(part, plan, a.shape[1]).masked_fill_(dropped_P1, 0) for part, a in zip(parts, A, strict=True)]


def down_backward(
    dHs: Sequence[Tensor], x_TD: Tensor, A: Sequence[Tensor], plan: RoutePlan, need_x: bool, need_A: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Spread dH over the columns, then two GEMMs.

    Args:
        dHs: [P, L_i].
        x_TD: As in the forward.
        A: As in the forward.
        plan: As in the forward.
        need_x: Whether dx is wanted.
        need_A: Which dA are wanted.

    Returns:
        dx [T, D] and one dA [E, L_i, D] a stack; None where not wanted.
    """
    dtype = dHs[0].dtype
    dropped_P1 = dropped_pairs(plan)
    parts = [_spread_sum(dH_PL.masked_fill(dropped_P1, 0), plan) for dH_PL in dHs]
    dH_TC = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    dx = (dH_TC @ cpu.join_down(list(A), dtype)).to(x_TD.dtype) if need_x else None
    dA: list[Tensor | None] = [None] * len(A)
    if any(need_A):
        dA_CD = dH_TC.t() @ x_TD.to(dtype)
        columns = [a.shape[0] * a.shape[1] for a in A]
        dA = [part.view_as(a).to(a.dtype) for part, a in zip(dA_CD.split(columns), A, strict=True)]
    return dx, dA


def up(H_PL: Tensor, B_EOL: Tensor, plan: RoutePlan, weights: Tensor, scale: float, base_TO: Tensor | None) -> Tensor:
    """Weigh in rank space, spread over the columns, one GEMM with all B.

    Args:
        H_PL: [P, L] in the given order.
        B_EOL: [E, O, L].
        plan: The routing.
        weights: [T, K] or [P].
        scale: Factor on the sum.
        base_TO: Added.

    Returns:
        [T, O] in the dtype of the base, else of H.
    """
    dtype = torch.promote_types(H_PL.dtype, B_EOL.dtype)
    factor_P1 = weights.reshape(-1, 1) * scale
    G_TC = _spread_sum((H_PL * factor_P1).masked_fill_(dropped_pairs(plan), 0).to(dtype), plan)
    if base_TO is not None and base_TO.dtype == dtype:
        return cpu.add_up(base_TO, G_TC, B_EOL, owned=False)
    y_TO = cpu.add_up(None, G_TC, B_EOL, owned=True)
    return y_TO.to(H_PL.dtype) if base_TO is None else y_TO.add_(base_TO).to(base_TO.dtype)


def up_backward(
    dy_TO: Tensor,
    H_PL: Tensor,
    B_EOL: Tensor,
    weights: Tensor,
    plan: RoutePlan,
    scale: float,
    need_H: bool,
    need_B: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One GEMM with all B, then everything in rank space, then one GEMM for dB.

    Args:
        dy_TO: [T, O].
        H_PL: As in the forward.
        B_EOL: As in the forward.
        weights: As in the forward.
        plan: As in the forward.
        scale: As in the forward.
        need_H: Whether dH is wanted.
        need_B: Whether dB is wanted.
        need_weights: Whether the gates' gradient is wanted.

    Returns:
        dH [P, L], dB [E, O, L] and dw in the shape of the weights; None where not wanted.
    """
    L = B_EOL.shape[2]
    dtype = torch.promote_types(H_PL.dtype, B_EOL.dtype)
    dyc_TO = dy_TO.to(dtype)
    dropped_P1 = dropped_pairs(plan)
    factor_P1 = weights.reshape(-1, 1) * scale
    dH = dB = dweights = None
    if need_H or need_weights:
        U_PL = _gather(cpu.project(dyc_TO, B_EOL), plan, L).to(factor_P1.dtype)
        if need_weights:
            dweights = (U_PL * H_PL).sum(-1, keepdim=True).mul_(scale).masked_fill_(dropped_P1, 0).view_as(weights)
        if need_H:
            dH = U_PL.mul_(factor_P1).masked_fill_(dropped_P1, 0).to(H_PL.dtype)
    if need_B:
        G_TC = _spread_sum((H_PL * factor_P1).masked_fill_(dropped_P1, 0).to(dtype), plan)
        dB = cpu.up_gradient(dyc_TO, G_TC, B_EOL)
    return dH, dB, dweights
