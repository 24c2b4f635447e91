"""One projection in one dtype: the straight line through the dense implementation.

The same mathematics as `autograd.DenseLoraGroup` (see `cpu` for the equations) for the case that most calls are: one
bank, float32 or float64 everywhere. At a hundred tokens the general function's bookkeeping in Python costs as much as
two of its GEMMs; here every line is one call.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank, C = E*L columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kit_kernels.lora_experts import cpu
from moe_kit_kernels.route_plan import RoutePlan


def fits(x_TD: Tensor, weights: Tensor, base: Tensor | None, A_ELD: Tensor, B_EOL: Tensor) -> bool:
    """Tell whether the straight line serves a call.

    Args:
        x_TD: inputs.
        weights: weights of the pairs.
        base: base result or None.
        A_ELD: down projections.
        B_EOL: up projections.

    Returns:
        True when all have one dtype, float32 or float64.
    """
    dtype = x_TD.dtype
    return (
        dtype in (torch.float32, torch.float64)
        and dtype == weights.dtype == A_ELD.dtype == B_EOL.dtype
        and (base is None or base.dtype == dtype)
    )


def forward(
    plan: RoutePlan | None,
    scale: float,
    owned: bool,
    x_TD: Tensor,
    weights: Tensor,
    base_TO: Tensor | None,
    A_ELD: Tensor,
    B_EOL: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the result, and H of the chosen experts.

    Args:
        plan: the routing; None when every expert is chosen.
        scale: factor on the sum.
        owned: write over `base_TO`.
        x_TD: [T, D] inputs.
        weights: [T, K], [P] or [T, E].
        base_TO: [T, O] or None.
        A_ELD: [E, L, D].
        B_EOL: [E, O, L].
        keep: gather H for the backward.

    Returns:
        [T, O], and [P, L] (or [T, C] when every expert is chosen) or None.
    """
    E, O, L = B_EOL.shape
    H_TC = torch.mm(x_TD, A_ELD.flatten(0, 1).t())
    expand_EC = cpu.expansion(E, (L,), scale, x_TD.dtype, x_TD.device)
    kept = None
    if plan is None:
        factors_TC = torch.mm(weights, expand_EC[:-1])
        kept = H_TC if keep else None
        G_TC = H_TC * factors_TC if keep else H_TC.mul_(factors_TC)
    else:
        if keep:
            kept = H_TC.view(-1, L).index_select(0, cpu.chosen_rows(plan, 1))
        G_TC = H_TC.mul_(torch.mm(plan.gates_TE1(weights), expand_EC))
    Bt_CO = B_EOL.permute(1, 0, 2).reshape(O, E * L).t()
    if base_TO is None:
        return torch.mm(G_TC, Bt_CO), kept
    return (base_TO.addmm_(G_TC, Bt_CO) if owned else torch.addmm(base_TO, G_TC, Bt_CO)), kept


class DenseLora(torch.autograd.Function):
    """`apply(plan, scale, overwrite, x_TD, weights, base_TO, A_ELD, B_EOL)` -> [T, O]."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: RoutePlan | None,
        scale: float,
        overwrite: bool,
        x_TD: Tensor,
        weights: Tensor,
        base_TO: Tensor | None,
        A_ELD: Tensor,
        B_EOL: Tensor,
    ) -> Tensor:
        """Add the experts to the base."""
        needs = ctx.needs_input_grad
        y_TO, kept = forward(plan, scale, overwrite, x_TD, weights, base_TO, A_ELD, B_EOL, needs[4] or needs[7])
        if overwrite and base_TO is not None:
            ctx.mark_dirty(base_TO)
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(x_TD, weights, A_ELD, B_EOL, kept)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        """Compute the gradients that are asked for."""
        x_TD, weights, A_ELD, B_EOL, kept = ctx.saved_tensors
        plan = ctx.plan
        _, _, _, need_x, need_weights, need_base, need_A, need_B = ctx.needs_input_grad
        E, O, L = B_EOL.shape
        T = x_TD.shape[0]
        expand_EC = cpu.expansion(E, (L,), ctx.scale, x_TD.dtype, x_TD.device)
        table = weights if plan is None else plan.gates_TE1(weights)
        factors_TC = torch.mm(table, expand_EC if plan is not None else expand_EC[:-1])
        dx = dweights = dA = dB = None
        if need_x or need_weights or need_A:
            U_TC = torch.mm(dy_TO, B_EOL.permute(1, 0, 2).reshape(O, E * L))
        if kept is not None:
            if plan is None:
                H_TC = kept
            else:
                H_TC = kept.new_zeros(T * E, L).index_copy_(0, cpu.chosen_rows(plan, 1), kept).view(T, E * L)
            if need_weights:
                dweights = cpu.gate_gradient(U_TC, H_TC, expand_EC, plan, weights)
            if need_B:
                G_TC = H_TC * factors_TC if plan is None else H_TC.mul_(factors_TC)
                # a view: autograd copies it into the parameter's layout only when it has to keep it
                dB = torch.mm(G_TC.t(), dy_TO).view(E, L, O).transpose(1, 2)
        if need_x or need_A:
            dH_TC = U_TC.mul_(factors_TC)
            if need_A:
                dA = torch.mm(dH_TC.t(), x_TD).view(A_ELD.shape)
            if need_x:
                dx = torch.mm(dH_TC, A_ELD.flatten(0, 1))
        return None, None, None, dx, dweights, dy_TO if need_base else None, dA, dB
