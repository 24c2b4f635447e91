"""Feed-forward experts in C++ on the CPU: the steps of `cpu.py`, each product with all that follows it while it is in cache.

Shapes: P pairs sorted by expert, D width, F pre-activation width, H activation width.
"""

from torch import Tensor

from moe_kit_kernels.experts_mlp.call import Call, Needs
from moe_kit_kernels.grouped_mm import native as mm
from moe_kit_kernels.grouped_mm.cpu import combine, grad_bias


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return the result `[T, D]` and, with `keep`, the pre-activations `[P, F]` in sorted order."""
    x_TD, up_EFD, down_EDH, plan, weights_P, up_bias_EF, down_bias_ED, activation = call
    how = {"activation": activation, "gated": call.gated, "keep": keep}
    h_PH, z_PF = mm.product(x_TD, up_EFD, plan, gather=True, bias_EO=up_bias_EF, **how)
    y_PD, _ = mm.product(h_PH, down_EDH, plan, gather=False, bias_EO=down_bias_ED)
    return combine(y_PD, plan, weights_P), z_PF


def backward(call: Call, dy_TD: Tensor, z_PF: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of `Needs`; None where `needs` says so."""
    x_TD, up_EFD, down_EDH, plan, weights_P, _, down_bias_ED, activation = call
    dx = d_up = d_down = d_up_bias = d_down_bias = None
    dz_PF = wh_PH = dweights = None
    if needs.z or needs.down or needs.weights:
        which = {"need_z": needs.z, "need_h": needs.down, "need_weights": needs.weights}
        dz_PF, wh_PH, dweights = mm.through(dy_TD, down_EDH, weights_P, z_PF, plan, activation, **which)
    if needs.down_bias or (needs.weights and down_bias_ED is not None):
        dy_PD = dy_TD.index_select(0, plan.sorted_token_P)
        if dweights is not None and down_bias_ED is not None:
            more_P = call.bias_dots(dy_PD)
            more_P[plan.host_offsets[-1] :] = 0
            dweights += more_P.index_select(0, plan.inverse_P)
        if needs.down_bias:
            d_down_bias = grad_bias(dy_PD * weights_P.index_select(0, plan.order_P)[:, None], plan)
    if wh_PH is not None:
        d_down = mm.sums(dy_TD, wh_PH, down_EDH, plan, gather=(True, False))
    if needs.up:
        d_up = mm.sums(dz_PF, x_TD, up_EFD, plan, gather=(False, True))
    if needs.up_bias:
        d_up_bias = grad_bias(dz_PF, plan)
    if needs.x:
        dx_PD, _ = mm.product(dz_PF, up_EFD.transpose(1, 2), plan, gather=False)
        dx = combine(dx_PD, plan)
    return dx, d_up, d_down, dweights, d_up_bias, d_down_bias
