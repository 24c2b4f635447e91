"""Feed-forward experts on the CPU: one expert after the other, so that its activations stay in the cache.

Forward, for each expert with rows: gather, first GEMM, activation, second GEMM; then one pass that sums every token's
rows. Backward, with `dY_p = dy_{t(p)}`:

    t = dY V;  dw_p = <t_p, h_p> + <dY_p, c>;  dh = w t;  dz = dact(dh);  dV = (w dY)^T h;  dU = dz^T x;  dx_p = dz U

The gradient of the weights comes from `t`, of width H, so the second GEMM's result is never kept. Saved: x (shared), z
`[P, F]` and the routing. Everything else is made again in the cache.

Shapes: n rows of one expert, P pairs sorted by expert, D width, F pre-activation width, H activation width.
"""

import torch
from torch import Tensor

from moe_kit_kernels.grouped_mm import cpu as mm
from moe_kit_kernels.grouped_mm.activations import activate, activate_backward
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
    gated = up_EFD.shape[1] == 2 * down_EDH.shape[2]
    P = plan.num_pairs
    x_PD = x_TD.index_select(0, plan.sorted_token_P)
    y_PD = x_TD.new_empty(P, down_EDH.shape[1])
    z_PF = x_TD.new_empty(P, up_EFD.shape[1]) if keep else None
    for e, start, end in mm.runs(plan):
        if z_PF is None:
            z_nF = mm.linear(x_PD[start:end], up_EFD[e])
        else:
            z_nF = z_PF[start:end]
            mm.linear_into(x_PD[start:end], up_EFD[e], z_nF)
        if up_bias_EF is not None:
            z_nF += up_bias_EF[e]
        mm.linear_into(activate(z_nF, activation, gated), down_EDH[e], y_PD[start:end])
        if down_bias_ED is not None:
            y_PD[start:end] += down_bias_ED[e]
    y_PD[plan.host_offsets[-1] :] = 0
    return mm.combine(y_PD, plan, weights_P), z_PF


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
    need_x, need_up, need_down, need_weights, need_up_bias, need_down_bias = needs
    need_z = need_x or need_up or need_up_bias
    gated = up_EFD.shape[1] == 2 * down_EDH.shape[2]
    dtype, P = x_TD.dtype, plan.num_pairs
    offsets = plan.host_offsets
    w_P1 = weights_P.index_select(0, plan.order_P)[:, None]
    dy_PD = dy_TD.index_select(0, plan.sorted_token_P)
    x_PD = x_TD.index_select(0, plan.sorted_token_P) if need_up else None
    dx_PD = torch.empty(P, x_TD.shape[1], dtype=dtype) if need_x else None
    d_up = torch.empty_like(up_EFD) if need_up else None
    d_down = torch.empty_like(down_EDH) if need_down else None
    dw_P = torch.zeros_like(w_P1[:, 0]) if need_weights else None
    d_up_bias = up_EFD.new_zeros(up_EFD.shape[:2]) if need_up_bias else None
    d_down_bias = down_EDH.new_zeros(down_EDH.shape[:2]) if need_down_bias else None
    for e in range(plan.num_experts):
        start, end = offsets[e], offsets[e + 1]
        if start == end:
            for gradient in (d_up, d_down):
                if gradient is not None:
                    gradient[e].zero_()
            continue
        w_n1, dy_nD, z_nF = w_P1[start:end], dy_PD[start:end], z_PF[start:end]
        dz_nF = torch.empty_like(z_nF)
        t_nH = torch.mm(dy_nD, down_EDH[e]) if need_z or need_weights else None
        if need_z:
            h_nH = activate_backward((t_nH * w_n1).to(dtype), z_nF, activation, gated, dz_nF)
        else:
            h_nH = activate(z_nF, activation, gated)
        if dw_P is not None:
            torch.linalg.vecdot(t_nH.to(dw_P.dtype), h_nH.to(dw_P.dtype), out=dw_P[start:end])
            if down_bias_ED is not None:
                dw_P[start:end] += (dy_nD @ down_bias_ED[e]).to(dw_P.dtype)
        if d_down is not None:
            mm.product_into(dy_nD, (h_nH * w_n1).to(dtype), d_down[e])
        if d_down_bias is not None:
            d_down_bias[e] = (dy_nD * w_n1).sum(0)
        if d_up is not None:
            mm.product_into(dz_nF, x_PD[start:end], d_up[e])
        if d_up_bias is not None:
            torch.sum(dz_nF, 0, out=d_up_bias[e])
        if dx_PD is not None:
            torch.mm(dz_nF, up_EFD[e], out=dx_PD[start:end])
    dx = dweights = None
    if dx_PD is not None:
        dx_PD[offsets[-1] :] = 0
        dx = mm.combine(dx_PD, plan)
    if dw_P is not None:
        dweights = dw_P.index_select(0, plan.inverse_P).to(weights_P.dtype)
    return dx, d_up, d_down, dweights, d_up_bias, d_down_bias
