"""LoRA on each expert of a stack of mixture-of-experts weights, inside the base product.

    y_p = x_p W_{e(p)}^T + scale * (x_p A_{e(p)}^T) B_{e(p)}^T

Not to be confused with `lora_experts`, which routes LoRA experts on one dense base: here the base differs by expert.
`W + scale * B A` is never made. See `README.md`. Shapes: T tokens, P pairs, E experts, D width in, O width out, L rank.
"""

import torch
from torch import Tensor

from moe_kit_kernels.common.checks import check_device, check_float, check_shape
from moe_kit_kernels.grouped_mm import grouped_mm
from moe_kit_kernels.grouped_mm.backend import grouped_backend
from moe_kit_kernels.lora_grouped import reference
from moe_kit_kernels.lora_grouped.autograd import LoraGrouped
from moe_kit_kernels.route_plan import RoutePlan, check_plan_device

__all__ = ["lora_grouped"]


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
    backend: str = "auto",
) -> Tensor:
    """Multiply the rows of each expert by its matrix and its low-rank addition.

    Args:
        x: `[T, D]` tokens with `gather`, else `[P, D]` rows in the plan's sorted order. Cast to the weight's dtype.
        weight_EOD: `[E, O, D]`, any strides; usually frozen, then no gradient is made.
        A_ELD: `[E, L, D]`; may be wider than the weight (float32 adapters on a bfloat16 base), and is cast.
        B_EOL: `[E, O, L]`; as A.
        plan: The routing; `plan.num_experts` must be E.
        gather: Read row `token(p)` of x instead of row p.
        scatter: Return rows in the order in which the pairs were given instead of sorted by expert.
        scale: LoRA's alpha / rank.
        backend: "auto", "native" (C++ on the CPU), "cpu" (plain PyTorch), "triton" or "reference".

    Returns:
        `[P, O]` of x's dtype; rows of dropped pairs are zero. Differentiable in x, weight, A and B.

    Raises:
        KernelError: Wrong shapes, dtypes, devices or backend.

    Example:
        >>> import torch
        >>> from moe_kit_kernels import route_plan
        >>> one = torch.ones(1, 1, 1)
        >>> lora_grouped(torch.ones(1, 1), one, one, one, route_plan(torch.tensor([[0]]), 1), scale=0.5).item()
        1.5
    """
    check_float("lora_grouped", "weight_EOD", weight_EOD, 3)
    check_float("lora_grouped", "x", x, 2)
    check_float("lora_grouped", "A_ELD", A_ELD, 3)
    check_float("lora_grouped", "B_EOL", B_EOL, 3)
    E, O, D = weight_EOD.shape
    L = A_ELD.shape[1]
    check_shape("lora_grouped", "weight_EOD", weight_EOD, (plan.num_experts, None, None), "the plan's num_experts")
    rows, why = (plan.num_tokens, "the plan's tokens") if gather else (plan.num_pairs, "the plan's pairs")
    check_shape("lora_grouped", "x", x, (rows, D), f"{why}, weight's last size")
    check_shape("lora_grouped", "A_ELD", A_ELD, (E, None, D), "experts and width of the weight")
    check_shape("lora_grouped", "B_EOL", B_EOL, (E, O, L), "experts and width of the weight, rank of A")
    check_device("lora_grouped", x.device, weight_EOD=weight_EOD, A_ELD=A_ELD, B_EOL=B_EOL)
    check_plan_device("lora_grouped", x.device, plan)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        weight_EOD = weight_EOD.to(dtype)
    compute = weight_EOD.dtype
    x, A_ELD, B_EOL = x.to(compute), A_ELD.to(compute), B_EOL.to(compute)
    name = grouped_backend("lora_grouped", backend, plan.num_pairs, (weight_EOD, A_ELD, B_EOL), x)
    if name == "reference":
        y = reference.lora_grouped(x, weight_EOD, A_ELD, B_EOL, plan, gather=gather, scatter=scatter, scale=scale)
    elif torch.compiler.is_compiling():
        # three grouped products: each is one operator of the graph
        h_PL = grouped_mm(x, A_ELD, plan, gather=gather, backend=backend) * scale
        base_PO = grouped_mm(x, weight_EOD, plan, gather=gather, scatter=scatter, backend=backend)
        y = grouped_mm(h_PL, B_EOL, plan, scatter=scatter, residual=base_PO, backend=backend)
    else:
        y = LoraGrouped.apply(x, weight_EOD, A_ELD, B_EOL, plan, gather, scatter, scale, name)
    return y.to(dtype)
