"""Autograd function of the grouped GEMM for the plain PyTorch path.

    dz = dact(weight_p * dy_p);  dW_e = dz^T x;  db_e = sum dz;  dx = dz W_e;  dweight_p = <dy_p, act(z_p)>

Saved: x (shared with the caller), the weight, and the pre-activations z only where an activation or the gradient of the
weights needs them.
"""

import torch
from torch import Tensor

from moe_kit_kernels.grouped_mm import cpu
from moe_kit_kernels.grouped_mm.activations import activate, activate_backward
from moe_kit_kernels.route_plan import RoutePlan


class GroupedMM(torch.autograd.Function):
    """`residual + weights * act(x W_e^T + b_e)` over the pairs of a plan."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight_EOD: Tensor,
        bias_EO: Tensor | None,
        weights_P: Tensor | None,
        residual: Tensor | None,
        plan: RoutePlan,
        gather: bool,
        scatter: bool,
        activation: str | None,
        gated: bool,
    ) -> Tensor:
        """Return `[P, O]` rows, sorted or in the given order."""
        x_PD = x.index_select(0, plan.sorted_token_P) if gather else x
        z_PF = cpu.forward(x_PD, weight_EOD, plan, bias_EO)
        needs_z = activation is not None or (weights_P is not None and ctx.needs_input_grad[3])
        ctx.save_for_backward(x, weight_EOD, weights_P, z_PF if needs_z else None)
        ctx.plan, ctx.gather, ctx.scatter, ctx.activation, ctx.gated = plan, gather, scatter, activation, gated
        y_PO = z_PF if activation is None else activate(z_PF, activation, gated)
        if weights_P is not None:
            w_P1 = weights_P.index_select(0, plan.order_P)[:, None]
            y_PO = (y_PO * w_P1).to(y_PO.dtype)
        if scatter:
            y_PO = y_PO.index_select(0, plan.inverse_P)
        return y_PO if residual is None else residual + y_PO

    @staticmethod
    def backward(ctx, dy: Tensor):
        """Return the gradients of x, weight, bias, weights and residual."""
        x, weight_EOD, weights_P, z_PF = ctx.saved_tensors
        plan, activation, gated = ctx.plan, ctx.activation, ctx.gated
        need_x, need_weight, need_bias, need_weights, need_residual = ctx.needs_input_grad[:5]
        d_residual = dy if need_residual else None
        dy_PO = dy.index_select(0, plan.order_P) if ctx.scatter else dy.contiguous()
        dh_PO = dy_PO
        if weights_P is not None:
            dh_PO = (dy_PO * weights_P.index_select(0, plan.order_P)[:, None]).to(dy_PO.dtype)
        y_PO = z_PF
        if activation is not None:
            dz_PF = torch.empty_like(z_PF)
            y_PO = activate_backward(dh_PO, z_PF, activation, gated, dz_PF)
        else:
            dz_PF = dh_PO
        d_weights = None
        if need_weights:
            dot_P = torch.linalg.vecdot(dy_PO.to(weights_P.dtype), y_PO.to(weights_P.dtype))
            # rows behind the last run belong to dropped pairs
            dot_P[plan.host_offsets[-1] :] = 0
            d_weights = dot_P.index_select(0, plan.inverse_P)
        dx = dw = db = None
        if need_x:
            dx = cpu.grad_input(dz_PF, weight_EOD, plan)
            if ctx.gather:
                dx = cpu.combine(dx, plan)
        if need_weight:
            x_PD = x.index_select(0, plan.sorted_token_P) if ctx.gather else x
            dw = cpu.grad_weight(dz_PF, x_PD, weight_EOD, plan)
        if need_bias:
            db = cpu.grad_bias(dz_PF, plan)
        return dx, dw, db, d_weights, d_residual, None, None, None, None, None
