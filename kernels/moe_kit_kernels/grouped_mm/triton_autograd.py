"""Autograd function of the grouped GEMM on the Triton kernels; the equations are those of `autograd.py`."""

import torch
from torch import Tensor

from moe_kit_kernels.grouped_mm import launch, launch_sums
from moe_kit_kernels.grouped_mm.activations import activate_backward
from moe_kit_kernels.route_plan import RoutePlan


class GroupedMMTriton(torch.autograd.Function):
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
        tiles = launch.plan_tiles(plan)
        keep = activation is not None or (weights_P is not None and ctx.needs_input_grad[3])
        y_PO, z_PF = launch.product(
            x,
            weight_EOD,
            plan,
            tiles,
            gather=gather,
            scatter=scatter,
            bias_EO=bias_EO,
            weights_P=weights_P,
            residual=residual,
            activation=activation,
            gated=gated,
            keep=keep and any(ctx.needs_input_grad),
        )
        ctx.save_for_backward(x, weight_EOD, weights_P, z_PF)
        ctx.plan, ctx.tiles, ctx.gather, ctx.scatter = plan, tiles, gather, scatter
        ctx.activation, ctx.gated = activation, gated
        return y_PO

    @staticmethod
    def backward(ctx, dy: Tensor):
        """Return the gradients of x, weight, bias, weights and residual."""
        x, weight_EOD, weights_P, z_PF = ctx.saved_tensors
        plan, activation, gated = ctx.plan, ctx.activation, ctx.gated
        need_x, need_weight, need_bias, need_weights, need_residual = ctx.needs_input_grad[:5]
        d_residual = dy if need_residual else None
        dy_PO = dy.index_select(0, plan.order_P) if ctx.scatter else dy.contiguous()
        dz_PF, y_PO = dy_PO, z_PF
        if weights_P is not None:
            dz_PF = (dy_PO * weights_P.index_select(0, plan.order_P)[:, None]).to(dy_PO.dtype)
        if activation is not None:
            dh_PO, dz_PF = dz_PF, torch.empty_like(z_PF)
            y_PO = activate_backward(dh_PO, z_PF, activation, gated, dz_PF)
        dx = dw = db = d_weights = None
        if need_weights:
            dot_P = torch.linalg.vecdot(dy_PO.to(weights_P.dtype), y_PO.to(weights_P.dtype))
            dropped_P = plan.sorted_expert_P == plan.num_experts
            d_weights = dot_P.masked_fill(dropped_P, 0).index_select(0, plan.inverse_P)
        if need_x:
            dx, _ = launch.product(dz_PF, weight_EOD.transpose(1, 2), plan, ctx.tiles)
            dx = launch_sums.combine(dx, plan) if ctx.gather else dx
        if need_weight or need_bias:
            dw, db = launch_sums.gram(dz_PF, x, weight_EOD, plan, gather_x=ctx.gather, bias=need_bias)
        return dx, dw if need_weight else None, db, d_weights, d_residual, None, None, None, None, None


def grouped_mm(
    x: Tensor,
    weight_EOD: Tensor,
    plan: RoutePlan,
    *,
    gather: bool,
    scatter: bool,
    bias_EO: Tensor | None,
    weights: Tensor | None,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    """Run the operator on the kernels; same arguments as the public `grouped_mm`."""
    weights_P = None if weights is None else weights.reshape(-1)
    return GroupedMMTriton.apply(x, weight_EOD, bias_EO, weights_P, residual, plan, gather, scatter, activation, gated)
