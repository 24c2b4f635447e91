"""Feed-forward experts in C++ on the CPU: the steps of `cpu.py`, each product with all that follows it while it is in cache.

Shapes: P pairs sorted by expert, D width, F pre-activation width, H activation width.
"""

import torch
from torch import Tensor

from moe_kit_kernels.grouped_mm import native as mm
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
    how = {"activation": activation, "gated": gated, "keep": keep}
    h_PH, z_PF = mm.product(x_TD, up_EFD, plan, gather=True, bias_EO=up_bias_EF, **how)
    y_PD, _ = mm.product(h_PH, down_EDH, plan, gather=False, bias_EO=down_bias_ED)
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
    dx = d_up = d_down = d_up_bias = d_down_bias = None
    dz_PF = wh_PH = dweights = None
    if need_z or need_down or need_weights:
        which = {"need_z": need_z, "need_h": need_down, "need_weights": need_weights}
        dz_PF, wh_PH, dweights = mm.through(dy_TD, down_EDH, weights_P, z_PF, plan, activation, **which)
    if need_down_bias or (need_weights and down_bias_ED is not None):
        dy_PD = dy_TD.index_select(0, plan.sorted_token_P)
        if dweights is not None and down_bias_ED is not None:
            bias_PD = down_bias_ED.index_select(0, plan.sorted_expert_P.clamp_max(plan.num_experts - 1))
            more_P = torch.linalg.vecdot(dy_PD, bias_PD)
            more_P[plan.host_offsets[-1] :] = 0
            dweights += more_P.index_select(0, plan.inverse_P)
        if need_down_bias:
            d_down_bias = mm.grad_bias(dy_PD * weights_P.index_select(0, plan.order_P)[:, None], plan)
    if wh_PH is not None:
        d_down = mm.sums(dy_TD, wh_PH, down_EDH, plan, gather=(True, False))
    if need_up:
        d_up = mm.sums(dz_PF, x_TD, up_EFD, plan, gather=(False, True))
    if need_up_bias:
        d_up_bias = mm.grad_bias(dz_PF, plan)
    if need_x:
        dx_PD, _ = mm.product(dz_PF, up_EFD.transpose(1, 2), plan, gather=False)
        dx = mm.combine(dx_PD, plan)
    return dx, d_up, d_down, dweights, d_up_bias, d_down_bias
