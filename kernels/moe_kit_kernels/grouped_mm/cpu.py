"""Grouped GEMM on the CPU: one library GEMM an expert with rows, written straight into the result.

    Z_PO[run e] = X_PD[run e] W_e^T;   dX = dZ W_e;   dW_e = dZ[run e]^T X[run e], every expert written, empty ones with 0

A GEMM with few rows and a row-major weight runs faster with the roles swapped, `(W X^T)^T`: the library then streams W
in its stored order. Measured (fp32, two cores with AVX-512, 512 x 512 and 2048 x 512): 1.2 to 2.4 times as fast for 9 to
48 rows, no gain outside. Used in that window only.

Shapes: n rows of one expert, P pairs sorted by expert, E experts, D width in, O width out.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from moe_kit_kernels.route_plan import RoutePlan

# rows for which the swapped form is faster; see the module docstring
SWAP_ROWS = range(9, 49)
# below this many elements one small bmm beats the embedding kernel's call
_SMALL_COMBINE = 64 * 512


def linear(x_nD: Tensor, weight_OD: Tensor) -> Tensor:
    """Return `x W^T`, `[n, O]`; for few rows it is a transposed view of `(W x^T)`."""
    if x_nD.shape[0] in SWAP_ROWS and weight_OD.stride(1) == 1 and x_nD.dtype is torch.float32:
        return torch.mm(weight_OD, x_nD.t()).t()
    return torch.mm(x_nD, weight_OD.t())


def linear_into(x_nD: Tensor, weight_OD: Tensor, out_nO: Tensor) -> None:
    """Write `x W^T` to `out_nO`."""
    if x_nD.shape[0] in SWAP_ROWS and weight_OD.stride(1) == 1 and x_nD.dtype is torch.float32:
        out_nO.copy_(torch.mm(weight_OD, x_nD.t()).t())
    else:
        torch.mm(x_nD, weight_OD.t(), out=out_nO)


def runs(plan: RoutePlan) -> list[tuple[int, int, int]]:
    """Return (expert, first row, last row + 1) of every expert that has rows."""
    offsets = plan.host_offsets
    return [(e, offsets[e], offsets[e + 1]) for e in range(plan.num_experts) if offsets[e + 1] > offsets[e]]


def forward(x_PD: Tensor, weight_EOD: Tensor, plan: RoutePlan, bias_EO: Tensor | None = None) -> Tensor:
    """Return `x W_e^T + b_e` of sorted rows, `[P, O]`; rows of dropped pairs are zero."""
    z_PO = x_PD.new_empty(x_PD.shape[0], weight_EOD.shape[1])
    for e, start, end in runs(plan):
        linear_into(x_PD[start:end], weight_EOD[e], z_PO[start:end])
        if bias_EO is not None:
            z_PO[start:end] += bias_EO[e]
    z_PO[plan.host_offsets[-1] :] = 0
    return z_PO


def grad_input(dz_PO: Tensor, weight_EOD: Tensor, plan: RoutePlan) -> Tensor:
    """Return `dz W_e` of sorted rows, `[P, D]`; rows of dropped pairs are zero."""
    dx_PD = dz_PO.new_empty(dz_PO.shape[0], weight_EOD.shape[2])
    for e, start, end in runs(plan):
        torch.mm(dz_PO[start:end], weight_EOD[e], out=dx_PD[start:end])
    dx_PD[plan.host_offsets[-1] :] = 0
    return dx_PD


def grad_weight(dz_PO: Tensor, x_PD: Tensor, weight_EOD: Tensor, plan: RoutePlan) -> Tensor:
    """Return `dz^T x` of every expert's run, `[E, O, D]` in the memory layout of `weight_EOD`."""
    dw_EOD = torch.empty_like(weight_EOD)
    offsets = plan.host_offsets
    for e in range(plan.num_experts):
        start, end = offsets[e], offsets[e + 1]
        if start == end:
            dw_EOD[e].zero_()
        else:
            product_into(dz_PO[start:end], x_PD[start:end], dw_EOD[e])
    return dw_EOD


def product_into(dz_nO: Tensor, x_nD: Tensor, out_OD: Tensor) -> None:
    """Write `dz^T x` to `out_OD`, in whichever order its memory is laid out."""
    if out_OD.stride(1) == 1:
        torch.mm(dz_nO.t(), x_nD, out=out_OD)
    else:
        torch.mm(x_nD.t(), dz_nO, out=out_OD.t())


def grad_bias(dz_PO: Tensor, plan: RoutePlan) -> Tensor:
    """Return the sum of every expert's rows, `[E, O]`."""
    db_EO = dz_PO.new_zeros(plan.num_experts, dz_PO.shape[1])
    for e, start, end in runs(plan):
        torch.sum(dz_PO[start:end], 0, out=db_EO[e])
    return db_EO


def combine(y_PO: Tensor, plan: RoutePlan, weights_P: Tensor | None = None) -> Tensor:
    """Sum every token's rows, each times its weight, in at least float32 and in slot order.

    Args:
        y_PO: Rows in sorted order; rows of dropped pairs finite.
        plan: The routing.
        weights_P: Weights in the given order; None = 1. Those of dropped pairs are not looked at where y is zero.

    Returns:
        `[T, O]` of `y_PO`'s dtype.
    """
    T, O = plan.num_tokens, y_PO.shape[1]
    dtype = y_PO.dtype
    if plan.num_pairs == 0:
        return y_PO.new_zeros(T, O)
    wide = torch.promote_types(dtype, torch.float32)
    if weights_P is not None:
        weights_P = weights_P.to(wide)
    if plan.slots is not None and y_PO.numel() <= _SMALL_COMBINE:
        y_TKO = y_PO.index_select(0, plan.inverse_P).view(T, plan.slots, O).to(wide)
        if weights_P is None:
            return y_TKO.sum(1).to(dtype)
        return torch.bmm(weights_P.view(T, 1, plan.slots), y_TKO).view(T, O).to(dtype)
    # one pass over y: every bag is a token, its entries are the sorted positions of the token's pairs
    if plan.slots is not None:
        entries, offsets = plan.inverse_P.view(T, plan.slots), None
        weights = None if weights_P is None else weights_P.view(T, plan.slots)
    else:
        entries, offsets = plan.inverse_P.index_select(0, plan.token_order_P), plan.token_offsets_T1[:-1]
        weights = None if weights_P is None else weights_P.index_select(0, plan.token_order_P)
    return embedding_bag(entries, y_PO.to(wide), offsets, mode="sum", per_sample_weights=weights).to(dtype)
