"""The grouped GEMM's steps on the Triton kernels, with the signatures that `cpu.py` gives them; `autograd.py` calls either."""

from torch import Tensor

from moe_kit_kernels.grouped_mm import launch, launch_sums
from moe_kit_kernels.route_plan import RoutePlan


def rows(x: Tensor, weight_EOD: Tensor, plan: RoutePlan, **options) -> tuple[Tensor, Tensor | None]:
    """Return the operator's result `[P, O]` and, with `keep`, the pre-activations in sorted order; one launch."""
    return launch.product(x, weight_EOD, plan, launch.plan_tiles(plan), **options)


def grad_rows(dz_PF: Tensor, weight_EOD: Tensor, plan: RoutePlan, gather: bool) -> Tensor:
    """Return `dx`: by token (summed over its rows) with `gather`, else sorted."""
    dx_PD, _ = launch.product(dz_PF, weight_EOD.transpose(1, 2), plan, launch.plan_tiles(plan))
    return launch_sums.combine(dx_PD, plan) if gather else dx_PD


def grad_stacks(
    dz_PF: Tensor, x: Tensor, weight_EOD: Tensor, plan: RoutePlan, gather: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the weight and of the bias, each where it is needed; one launch for both."""
    if not (need_weight or need_bias):
        return None, None
    dw, db = launch_sums.gram(dz_PF, x, weight_EOD, plan, gather_x=gather, bias=need_bias)
    return dw if need_weight else None, db
