"""Autograd of LoRA experts on the Triton kernels, with or without the base product inside.

    forward    H = down(x, A),  y = up(H, B) + base, or + x W^T + bias inside the same kernel
    backward   dH, dw = down'(dy, B, H)         one pass over dy, in rank space at once
               dx = up(dH, A) [+ dy W inside]   dA_e = dH_e^T x,   dB_e = dy^T (scale w H)_e

`dense` goes token by token, `sorted` expert by expert, `mixed` is sorted down and dense up (weight gradients always do, and write every expert). Kept for the
backward: x, H [P, L], weights, parameters, the plan.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank.
"""

from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.lora_experts import launch, triton_halves
from moe_kit_kernels.lora_experts.frozen import hold_frozen, take_weight
from moe_kit_kernels.route_plan import RoutePlan


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
        (H_PL,) = triton_halves.down(how, x_TD, [A_ELD], plan)
        more = {"weights": weights_TK, "scale": scale}
        if linear:
            assert base is not None
            dtype = torch.promote_types(x_TD.dtype, base.dtype)
            y_TO = launch.up_dense(H_PL, B_EOL, plan, dtype, linear=(x_TD, base, bias_O), **more)
        else:
            dtype = x_TD.dtype if base is None else base.dtype
            y_TO = triton_halves.up(how, H_PL, B_EOL, plan, dtype, base_TO=base, **more)
        ctx.how, ctx.plan, ctx.scale, ctx.linear = how, plan, scale, linear
        ctx.frozen, trained = hold_frozen(base if linear else None, ctx.needs_input_grad[4])
        ctx.save_for_backward(x_TD, weights_TK, trained, A_ELD, B_EOL, H_PL)
        return y_TO

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        """Launch the backward kernels that are asked for."""
        x_TD, weights_TK, trained, A_ELD, B_EOL, H_PL = ctx.saved_tensors
        how, plan, scale = ctx.how, ctx.plan, ctx.scale
        _, _, _, _, need_x, need_weights, need_base, need_bias, need_A, need_B = ctx.needs_input_grad
        need_H = need_x or need_A
        dH_PL, dB, dw_TK = triton_halves.up_backward(
            how, dy_TO, H_PL, B_EOL, weights_TK, plan, scale, need_H, need_B, need_weights
        )
        dx = dA = dbase = dbias = None
        if dH_PL is not None:
            linear = (dy_TO, take_weight(ctx.frozen, trained)) if ctx.linear and need_x else None
            dx, (dA,) = triton_halves.down_backward(how, [dH_PL], x_TD, [A_ELD], plan, need_x, [need_A], linear=linear)
        if need_base:
            dbase = dy_TO.t() @ x_TD if ctx.linear else dy_TO
        if need_bias:
            dbias = dy_TO.sum(0)
        return None, None, None, None, dx, dw_TK, dbase, dbias, dA, dB
