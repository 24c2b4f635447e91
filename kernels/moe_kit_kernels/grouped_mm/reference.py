"""Naive grouped GEMM, one pair at a time: the definition the other implementations must equal.

    y_p = residual_p + weight_p * act(x_p W_{e(p)}^T + b_{e(p)})

where x_p is row p of a sorted x, or row token(p) of x with `gather`. Rows of dropped pairs are zero (plus residual). The
result has x's dtype.
Shapes: T tokens, P pairs, E experts, D width in, O width out (halved by a gated activation).
"""

import torch
from torch import Tensor

from moe_kit_kernels.grouped_mm.activations import activate
from moe_kit_kernels.route_plan import RoutePlan


def grouped_mm(
    x: Tensor,
    weight_EOD: Tensor,
    plan: RoutePlan,
    *,
    gather: bool = False,
    scatter: bool = False,
    bias_EO: Tensor | None = None,
    weights: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Return `[P, O]` (`[P, O/2]` when gated), sorted by expert, or in the given order with `scatter`.

    Same arguments as the public `grouped_mm`, which documents them.
    """
    rows = []
    flat_P = None if weights is None else weights.reshape(-1)
    for position, (pair, expert) in enumerate(zip(plan.order_P.tolist(), plan.sorted_expert_P.tolist())):
        row = x[int(plan.token_P[pair])] if gather else x[position]
        if expert == plan.num_experts:
            row = row.new_zeros(weight_EOD.shape[1] // (2 if gated else 1))
        else:
            row = weight_EOD[expert] @ row
            if bias_EO is not None:
                row = row + bias_EO[expert]
            if activation is not None:
                row = activate(row, activation, gated)
            if flat_P is not None:
                row = (row.to(torch.promote_types(flat_P.dtype, row.dtype)) * flat_P[pair]).to(row.dtype)
        rows.append(row)
    if not rows:
        width = weight_EOD.shape[1] // (2 if gated else 1)
        y_PO = x.new_zeros(0, width) + 0 * (x.sum() + weight_EOD.sum())
    else:
        y_PO = torch.stack(rows)
    if scatter:
        y_PO = y_PO[plan.inverse_P]
    return y_PO if residual is None else (y_PO + residual).to(y_PO.dtype)
