"""Feed-forward experts on the Triton kernels; the equations are those of `cpu.py`.

Forward: one product with the gather in its load and activation (and gate) in its epilogue, one sorted product, one sum over
a token's rows with the weights in fp32. Backward: one product that steps through the activation in its epilogue (dz, w h
and <t, h> at once), two weight gradients with the gather in their loads, one product and one sum for dx.

Saved: x (shared), z `[P, F]`, the stacks, the weights and the routing.
"""

import torch
from torch import Tensor

from moe_kit_kernels.grouped_mm import launch, launch_sums
from moe_kit_kernels.route_plan import RoutePlan


def forward(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EDH: Tensor,
    plan: RoutePlan,
    weights_P: Tensor,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the result `[T, D]` and, with `keep`, the pre-activations `[P, F]` in sorted order."""
    tiles = launch.plan_tiles(plan)
    gated = up_EFD.shape[1] == 2 * down_EDH.shape[2]
    options = {"gather": True, "activation": activation, "gated": gated}
    h_PH, z_PF = launch.product(x_TD, up_EFD, plan, tiles, bias_EO=up_bias_EF, keep=keep, **options)
    y_PD, _ = launch.product(h_PH, down_EDH, plan, tiles, bias_EO=down_bias_ED)
    return launch_sums.combine(y_PD, plan, weights_P), z_PF


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EDH: Tensor,
    plan: RoutePlan,
    weights_P: Tensor,
    down_bias_ED: Tensor | None,
    z_PF: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, up, down, weights, up bias and down bias; None where `needs` says so."""
    # kept on the plan by the forward
    tiles = launch.plan_tiles(plan)
    need_x, need_up, need_down, need_weights, need_up_bias, need_down_bias = needs
    gated = up_EFD.shape[1] == 2 * down_EDH.shape[2]
    dx = d_up = d_down = dweights = d_up_bias = d_down_bias = None
    dz_PF, wh_PH, dot_P = launch.through_activation(
        dy_TD, down_EDH, z_PF, weights_P, plan, tiles, gather=True, activation=activation, gated=gated
    )
    if need_weights:
        if down_bias_ED is not None:
            expert_P = plan.sorted_expert_P.clamp_max(plan.num_experts - 1)
            dy_PD = dy_TD.index_select(0, plan.sorted_token_P)
            dot_P = dot_P + torch.linalg.vecdot(dy_PD, down_bias_ED.index_select(0, expert_P)).float()
        dot_P = dot_P.masked_fill(plan.sorted_expert_P == plan.num_experts, 0)
        dweights = dot_P.index_select(0, plan.inverse_P).to(weights_P.dtype)
    if need_down:
        d_down, _ = launch_sums.gram(dy_TD, wh_PH, down_EDH, plan, gather_dz=True)
    if need_down_bias:
        # the sum over an expert's rows of w dy, as the bias of a product with one column of ones
        w_P = weights_P.index_select(0, plan.order_P).float()
        ones_P1 = torch.ones(plan.num_pairs, 1, dtype=dy_TD.dtype, device=dy_TD.device)
        like_ED1 = down_EDH.new_empty(down_EDH.shape[0], down_EDH.shape[1], 1)
        _, d_down_bias = launch_sums.gram(dy_TD, ones_P1, like_ED1, plan, gather_dz=True, scale_P=w_P, bias=True)
    if need_up or need_up_bias:
        d_up, d_up_bias = launch_sums.gram(dz_PF, x_TD, up_EFD, plan, gather_x=True, bias=need_up_bias)
        d_up = d_up if need_up else None
    if need_x:
        dx_PD, _ = launch.product(dz_PF, up_EFD.transpose(1, 2), plan, tiles)
        dx = launch_sums.combine(dx_PD, plan)
    return dx, d_up, d_down, dweights, d_up_bias, d_down_bias
