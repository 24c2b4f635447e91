"""Feed-forward experts on the CPU: the two grouped GEMMs with few passes between them.

Backward, with `dY_p = dy_{t(p)}`:

    t = dY V;  dw_p = <t_p, h_p> + <dY_p, c>;  dh = w t;  dz = dact(dh);  dV = dY^T (w h);  dU = dz^T x;  dx_p = dz U

The gradient of the weights comes from `t`, of width H, so the second GEMM's result is never kept. Saved: x (shared), z
`[P, F]` and the routing; gathered rows and activations are made again.

Elementwise steps run over all pairs at once: with few rows an expert, one call each costs more than the cache saves.
Shapes: P pairs sorted by expert, D width, F pre-activation width, H activation width.
"""

import torch
from torch import Tensor

from moe_kit_kernels.experts_mlp.call import Call, Needs
from moe_kit_kernels.grouped_mm import cpu as mm
from moe_kit_kernels.grouped_mm.activations import activate, activate_, activate_backward


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return the result `[T, D]` and, with `keep`, the pre-activations `[P, F]` in sorted order."""
    x_TD, up_EFD, down_EDH, plan, weights_P, up_bias_EF, down_bias_ED, activation = call
    z_PF = mm.forward(x_TD.index_select(0, plan.sorted_token_P), up_EFD, plan, up_bias_EF)
    h_PH = activate(z_PF, activation, call.gated) if keep else activate_(z_PF, activation, call.gated)
    y_PD = mm.forward(h_PH, down_EDH, plan, down_bias_ED)
    return mm.combine(y_PD, plan, weights_P), z_PF if keep else None


def backward(call: Call, dy_TD: Tensor, z_PF: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of `Needs`; None where `needs` says so."""
    x_TD, up_EFD, down_EDH, plan, weights_P, _, down_bias_ED, activation = call
    dtype = x_TD.dtype
    dx = d_up = d_down = dweights = d_up_bias = d_down_bias = None
    w_P1 = weights_P.index_select(0, plan.order_P)[:, None]
    dy_PD = dy_TD.index_select(0, plan.sorted_token_P)
    t_PH = mm.grad_input(dy_PD, down_EDH, plan) if needs.z or needs.weights else None
    if needs.z:
        dz_PF = torch.empty_like(z_PF)
        # the weight is a factor of everything below the activation
        h_PH = activate_backward((t_PH * w_P1).to(dtype), z_PF, activation, call.gated, dz_PF)
    else:
        h_PH = activate(z_PF, activation, call.gated)
    if needs.weights:
        dw_P = torch.linalg.vecdot(t_PH.to(weights_P.dtype), h_PH.to(weights_P.dtype))
        if down_bias_ED is not None:
            dw_P += call.bias_dots(dy_PD).to(dw_P.dtype)
        # rows behind the last run belong to dropped pairs
        dw_P[plan.host_offsets[-1] :] = 0
        dweights = dw_P.index_select(0, plan.inverse_P)
    if needs.down:
        d_down = mm.grad_weight(dy_PD, (h_PH * w_P1).to(dtype), down_EDH, plan)
    if needs.down_bias:
        d_down_bias = mm.grad_bias((dy_PD * w_P1).to(dtype), plan)
    if needs.up:
        d_up = mm.grad_weight(dz_PF, x_TD.index_select(0, plan.sorted_token_P), up_EFD, plan)
    if needs.up_bias:
        d_up_bias = mm.grad_bias(dz_PF, plan)
    if needs.x:
        dx = mm.combine(mm.grad_input(dz_PF, up_EFD, plan), plan)
    return dx, d_up, d_down, dweights, d_up_bias, d_down_bias
