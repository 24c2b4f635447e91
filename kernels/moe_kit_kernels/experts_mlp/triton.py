"""Feed-forward experts on the Triton kernels; the equations are those of `cpu.py`.

Forward: one product with the gather in its load and activation (and gate) in its epilogue, one sorted product, one sum over
a token's rows with the weights in fp32. Backward: one product that steps through the activation in its epilogue (dz, w h
and <t, h> at once), two weight gradients with the gather in their loads, one product and one sum for dx.

Saved: x (shared), z `[P, F]`, the stacks, the weights and the routing.
"""

import torch
from torch import Tensor

from moe_kit_kernels.experts_mlp.call import Call, Needs
from moe_kit_kernels.grouped_mm import launch, launch_sums


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return the result `[T, D]` and, with `keep`, the pre-activations `[P, F]` in sorted order."""
    x_TD, up_EFD, down_EDH, plan, weights_P, up_bias_EF, down_bias_ED, activation = call
    tiles = launch.plan_tiles(plan)
    options = {"gather": True, "activation": activation, "gated": call.gated}
    h_PH, z_PF = launch.product(x_TD, up_EFD, plan, tiles, bias_EO=up_bias_EF, keep=keep, **options)
    y_PD, _ = launch.product(h_PH, down_EDH, plan, tiles, bias_EO=down_bias_ED)
    return launch_sums.combine(y_PD, plan, weights_P), z_PF


def backward(call: Call, dy_TD: Tensor, z_PF: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of `Needs`; None where `needs` says so."""
    x_TD, up_EFD, down_EDH, plan, weights_P, _, down_bias_ED, activation = call
    # kept on the plan by the forward
    tiles = launch.plan_tiles(plan)
    dx = d_up = d_down = dweights = d_up_bias = d_down_bias = None
    dz_PF, wh_PH, dot_P = launch.through_activation(
        dy_TD, down_EDH, z_PF, weights_P, plan, tiles, gather=True, activation=activation, gated=call.gated
    )
    if needs.weights:
        if down_bias_ED is not None:
            dot_P = dot_P + call.bias_dots(dy_TD.index_select(0, plan.sorted_token_P)).float()
        dot_P = dot_P.masked_fill(plan.sorted_expert_P == plan.num_experts, 0)
        dweights = dot_P.index_select(0, plan.inverse_P).to(weights_P.dtype)
    if needs.down:
        d_down, _ = launch_sums.gram(dy_TD, wh_PH, down_EDH, plan, gather_dz=True)
    if needs.down_bias:
        # the sum over an expert's rows of w dy, as the bias of a product with one column of ones
        w_P = weights_P.index_select(0, plan.order_P).float()
        ones_P1 = torch.ones(plan.num_pairs, 1, dtype=dy_TD.dtype, device=dy_TD.device)
        like_ED1 = down_EDH.new_empty(down_EDH.shape[0], down_EDH.shape[1], 1)
        _, d_down_bias = launch_sums.gram(dy_TD, ones_P1, like_ED1, plan, gather_dz=True, scale_P=w_P, bias=True)
    if needs.up or needs.up_bias:
        d_up, d_up_bias = launch_sums.gram(dz_PF, x_TD, up_EFD, plan, gather_x=True, bias=needs.up_bias)
        d_up = d_up if needs.up else None
    if needs.x:
        dx_PD, _ = launch.product(dz_PF, up_EFD.transpose(1, 2), plan, tiles)
        dx = launch_sums.combine(dx_PD, plan)
    return dx, d_up, d_down, dweights, d_up_bias, d_down_bias
