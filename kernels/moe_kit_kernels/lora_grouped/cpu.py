"""LoRA on every expert, on the CPU: the low-rank part is added into the base product, expert by expert.

    H = X A^T;  y = X W^T + s H B^T;  U = s dy B;  dx = dy W + U A;  dA = U^T X;  dB = dy^T (s H)

Saved: x (shared) and H `[P, L]`. `W + s B A` is never made, in either direction.
Shapes: P pairs sorted by expert, E experts, D width in, O width out, L rank.
"""

from torch import Tensor

from moe_kit_kernels.grouped_mm import cpu as mm
from moe_kit_kernels.grouped_mm.cpu import combine, gram
from moe_kit_kernels.route_plan import RoutePlan

__all__ = ["combine", "gram", "plain", "product"]


def extend(y_PO: Tensor, h_PL: Tensor, B_EOL: Tensor, plan: RoutePlan) -> None:
    """Add `h B_e^T` to the sorted rows of `y_PO`, in place."""
    experts = mm.experts_with_rows(plan)
    rows = zip(mm.split_rows(y_PO, plan, experts), mm.split_rows(h_PL, plan, experts), mm.pick(B_EOL, experts))
    for y_nO, h_nL, B_OL in rows:
        y_nO.addmm_(h_nL, B_OL.t())


def product(
    x: Tensor, weight_EOD: Tensor, h_PL: Tensor, B_EOL: Tensor, plan: RoutePlan, gather: bool, scatter: bool
) -> Tensor:
    """Return `x W^T + h B^T`, `[P, O]`, sorted or in the given order with `scatter`."""
    y_PO = plain(x, weight_EOD, plan, gather)
    extend(y_PO, h_PL, B_EOL, plan)
    return y_PO.index_select(0, plan.inverse_P) if scatter else y_PO


def plain(x: Tensor, weight_EOD: Tensor, plan: RoutePlan, gather: bool) -> Tensor:
    """Return `x W^T` of sorted rows, `[P, O]`."""
    return mm.product(x, weight_EOD, plan, gather=gather)[0]
