"""Autograd of LoRA experts on the Triton kernels, with or without the base product inside.

    forward    H = down(x, A),  y = up(H, B) + base, or + x W^T + bias inside the same kernel
    backward   dH, dw = down'(dy, B, H)         one pass over dy, in rank space at once
               dx = up(dH, A) [+ dy W inside]   dA_e = dH_e^T x,   dB_e = dy^T (scale w H)_e

`dense` goes token by token, `sorted` expert by expert (weight gradients always do, and write every expert). Kept for the
backward: x, H [P, L], weights, parameters, the plan.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kit_kernels.grouped_mm.launch import plan_tiles, product
from moe_kit_kernels.grouped_mm.launch_sums import gram
from moe_kit_kernels.lora_experts import launch
from moe_kit_kernels.lora_experts.frozen import hold_frozen, take_weight
from moe_kit_kernels.route_plan import RoutePlan


def _up(how: str, H_PL: Tensor, B_EOL: Tensor, plan: RoutePlan, dtype: torch.dtype, **more: Any) -> Tensor:
    return (launch.up_sorted if how == "sorted" else launch.up_dense)(H_PL, B_EOL, plan, dtype, **more)


def _down_sorted(x_TD: Tensor, A_ELD: Tensor, plan: RoutePlan) -> Tensor:
    """[P, L] in the given order, by segments of the sorted order."""
    dtype = torch.promote_types(x_TD.dtype, A_ELD.dtype)
    tiles = plan_tiles(plan)
    H_PL, _ = product(x_TD.to(dtype), A_ELD.to(dtype), plan, tiles, gather=True, scatter=True)
    return H_PL * (plan.expert_P < plan.num_experts).to(dtype)[:, None]


class TritonLora(torch.autograd.Function):
    """`apply(how, plan, scale, linear, x_TD, weights_TK, base, bias_O, A_ELD, B_EOL)` -> [T, O]."""

    @staticmethod
    def forward(
        ctx: Any,
        how: str,
        plan: RoutePlan,
        scale: float,
        linear: bool,
        x_TD: Tensor,
        weights_TK: Tensor,
        base: Tensor | None,
        bias_O: Tensor | None,
        A_ELD: Tensor,
        B_EOL: Tensor,
    ) -> Tensor:
        """Launch down and up."""
        weights_TK = weights_TK.float()
        H_PL = _down_sorted(x_TD, A_ELD, plan) if how == "sorted" else launch.down_dense(x_TD, A_ELD, plan)[0]
        more = {"weights": weights_TK, "scale": scale}
        if linear:
            assert base is not None
            dtype = torch.promote_types(x_TD.dtype, base.dtype)
            y_TO = launch.up_dense(H_PL, B_EOL, plan, dtype, linear=(x_TD, base, bias_O), **more)
        else:
            dtype = x_TD.dtype if base is None else base.dtype
            y_TO = _up(how, H_PL, B_EOL, plan, dtype, base_TO=base, **more)
        ctx.how, ctx.plan, ctx.scale, ctx.linear = how, plan, scale, linear
        ctx.frozen, trained = hold_frozen(base if linear else None, ctx.needs_input_grad[4])
        ctx.save_for_backward(x_TD, weights_TK, trained, A_ELD, B_EOL, H_PL)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        """Launch the backward kernels that are asked for."""
        x_TD, weights_TK, trained, A_ELD, B_EOL, H_PL = ctx.saved_tensors
        how, plan, scale = ctx.how, ctx.plan, ctx.scale
        _, _, _, _, need_x, need_weights, need_base, need_bias, need_A, need_B = ctx.needs_input_grad
        factor_P1 = (weights_TK * scale).view(-1, 1)
        dH_PL = dw_TK = dx = dA = dB = dbase = dbias = None
        if need_x or need_weights or need_A:
            if how == "sorted":
                U_PL = _down_sorted(dy_TO, B_EOL.transpose(1, 2), plan).float()
                dw_TK = (U_PL * H_PL).sum(-1).mul_(scale).view_as(weights_TK)
                dH_PL = (U_PL * factor_P1).to(H_PL.dtype)
            else:
                dH_PL, dw_TK = launch.down_dense(
                    dy_TO, B_EOL.transpose(1, 2), plan, weights=weights_TK, kept_PL=H_PL, scale=scale
                )
        order_P = plan.order_P if need_A or need_B else None
        if need_A:
            dA = gram(dH_PL.index_select(0, order_P), x_TD.to(dH_PL.dtype), A_ELD, plan, gather_x=True)[0]
        if need_B:
            G_PL = (H_PL * factor_P1).to(H_PL.dtype).index_select(0, order_P)
            dB = gram(dy_TO.to(G_PL.dtype), G_PL, B_EOL, plan, gather_dz=True)[0]
        if need_x:
            At_EDL = A_ELD.transpose(1, 2)
            if ctx.linear:
                W_OD = take_weight(ctx.frozen, trained)
                dx = launch.up_dense(dH_PL, At_EDL, plan, x_TD.dtype, linear=(dy_TO, W_OD.t(), None))
            else:
                dx = _up(how, dH_PL, At_EDL, plan, x_TD.dtype)
        if need_base:
            dbase = dy_TO.t() @ x_TD if ctx.linear else dy_TO
        if need_bias:
            dbias = dy_TO.sum(0)
        return None, None, None, None, dx, dw_TK if need_weights else None, dbase, dbias, dA, dB
