"""LoRA on every expert in C++ on the CPU: as `cpu.py`, the low-rank part added where the base's rows lie.

Shapes: P pairs sorted by expert, E experts, D width in, O width out, L rank.
"""

from torch import Tensor

from moe_kit_kernels.grouped_mm import native as mm
from moe_kit_kernels.grouped_mm.cpu import combine
from moe_kit_kernels.grouped_mm.native import gram
from moe_kit_kernels.route_plan import RoutePlan

__all__ = ["combine", "gram", "plain", "product"]


def product(
    x: Tensor, weight_EOD: Tensor, h_PL: Tensor, B_EOL: Tensor, plan: RoutePlan, gather: bool, scatter: bool
) -> Tensor:
    """Return `x W^T + h B^T`, `[P, O]`, sorted or in the given order with `scatter`."""
    y_PO = plain(x, weight_EOD, plan, gather)
    mm.product(h_PL, B_EOL, plan, gather=False, into_PO=y_PO)
    return y_PO.index_select(0, plan.inverse_P) if scatter else y_PO


def plain(x: Tensor, weight_EOD: Tensor, plan: RoutePlan, gather: bool) -> Tensor:
    """Return `x W^T` of sorted rows, `[P, O]`."""
    return mm.product(x, weight_EOD, plan, gather=gather)[0]
