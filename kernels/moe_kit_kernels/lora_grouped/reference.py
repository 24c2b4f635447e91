"""Naive LoRA on every expert of a stack: the definition the other implementations must equal.

    y_p = x_p W_{e(p)}^T + scale * (x_p A_{e(p)}^T) B_{e(p)}^T

Shapes: T tokens, P pairs, E experts, D width in, O width out, L rank.
"""

from torch import Tensor

from moe_kit_kernels.grouped_mm import reference
from moe_kit_kernels.route_plan import RoutePlan


def lora_grouped(
    x: Tensor,
    weight_EOD: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    plan: RoutePlan,
    *,
    gather: bool = False,
    scatter: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Return `[P, O]`; same arguments as the public `lora_grouped`, which documents them."""
    base_PO = reference.grouped_mm(x, weight_EOD, plan, gather=gather)
    h_PL = reference.grouped_mm(x, A_ELD, plan, gather=gather)
    y_PO = base_PO + scale * reference.grouped_mm(h_PL, B_EOL, plan)
    return y_PO[plan.inverse_P] if scatter else y_PO
