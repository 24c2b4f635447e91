"""The sorted pieces of a routing plan in C++ on the CPU: one call where PyTorch needs a dozen.

Shapes: P pairs, E experts.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.common.native import Native, is_plain, is_watched

if TYPE_CHECKING:
    from moe_kit_kernels.route_plan.plan import RoutePlan

NATIVE = Native(
    Path(__file__).with_name("native.cpp"),
    moe_kit_sort="expert:int64[P] token?:int64[P] order:int64[P] inverse:int64[P] sorted_token:int64[P] sorted_expert:int64[P] "
    "counts:int64[E] offsets:int64[E+1] first:int64[E+1] P:int64 slots:int64 E:int64",
)
_PIECES = ("order_P", "inverse_P", "sorted_token_P", "sorted_expert_P", "counts_E", "offsets_E1")


def serves(plan: "RoutePlan") -> bool:
    """Tell whether the C++ should sort a plan.

    Args:
        plan: the routing.

    Returns:
        True for plain tensors on the CPU, where it runs and nothing traces or looks on.
    """
    return not is_watched() and is_plain(plan.expert_P, plan.free_token_P, dtype=torch.int64) and NATIVE.available


def sort_pairs(plan: "RoutePlan") -> dict[str, Tensor]:
    """Make all sorted pieces.

    Args:
        plan: the routing, one that this `serves`.

    Returns:
        Name of each piece in `RoutePlan` -> int64 tensor, all in one allocation.

    Raises:
        KernelError: ids that are not the ones of which the plan was made any more.
    """
    P, E = plan.num_pairs, plan.num_experts
    expert_P = plan.expert_P.contiguous()
    token_P = None if plan.free_token_P is None else plan.free_token_P.contiguous()
    # one allocation
    sizes = (P, P, P, P, E, E + 1, E + 1)
    pieces = expert_P.new_empty(sum(sizes)).split(sizes)
    outside = NATIVE.functions.moe_kit_sort(expert_P, token_P, *pieces, P, plan.slots or 1, E)
    if outside:
        got, fix = f"{outside} ids outside", "Do not write to ids of which a plan was made"
        raise fail("route_plan", "the experts of the plan", got, f"ids in [0, {E}]", fix)
    # the last one is scratch
    return dict(zip(_PIECES, pieces[:-1], strict=True))
