"""Grouped GEMM: every (token, expert) pair of a routing times its expert's matrix, without padded memory.

    y_p = residual_p + weight_p * act(x_p W_{e(p)}^T + b_{e(p)})

`README.md` has the backward, the metadata table and the cost. Shapes: T tokens, P pairs, E experts, D width in, O width out.
"""

import torch
from torch import Tensor

from moe_kit_kernels.common.checks import check_device, check_float, check_shape, fail
from moe_kit_kernels.grouped_mm import reference
from moe_kit_kernels.grouped_mm.activations import ACTIVATIONS
from moe_kit_kernels.grouped_mm.autograd import GroupedMM
from moe_kit_kernels.grouped_mm.backend import grouped_backend
from moe_kit_kernels.grouped_mm.ops import grouped_mm_op
from moe_kit_kernels.route_plan import RoutePlan, check_plan_device

__all__ = ["grouped_mm"]


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
    backend: str = "auto",
) -> Tensor:
    """Multiply the rows of each expert by its matrix.

    Args:
        x: `[T, D]` tokens with `gather`, else `[P, D]` rows in the plan's sorted order. Cast to the weight's dtype.
        weight_EOD: `[E, O, D]`, any strides: a stack stored as `[E, D, O]` is passed as `weight.transpose(1, 2)`.
        plan: The routing; `plan.num_experts` must be E.
        gather: Read row `token(p)` of x instead of row p.
        scatter: Return the rows in the order in which the pairs were given (`p = t*K + k`) instead of sorted by expert.
        bias_EO: `[E, O]`, added before the activation.
        weights: Gate of each pair in the given order, `[P]` or `[T, K]`; multiplies the row after the activation.
        activation: None or a name in `ACTIVATIONS`: "silu", "gelu", "gelu_tanh", "relu", "relu2".
        gated: The activation of the first half of the outputs multiplies the second half; the result has width O/2.
        residual: Added last, in the shape and order of the result; of any floating dtype. Where one summand is float32,
            the sum is taken in float32.
        backend: "auto", "native" (C++ on the CPU), "cpu" (plain PyTorch), "triton" or "reference".

    Returns:
        `[P, O]` (`[P, O/2]` when gated) of x's dtype (autocast's dtype under autocast). Rows of dropped pairs are zero plus residual. Differentiable in
        x, weight, bias, weights and residual, each gradient of its tensor's dtype; the weight's gradient is written for every expert, zero for an empty one.

    Raises:
        KernelError: Wrong shapes, dtypes, devices, an unknown activation or backend, or a backend that cannot run here.

    Example:
        >>> import torch
        >>> from moe_kit_kernels import route_plan
        >>> plan = route_plan(torch.tensor([[1], [0]]), 2)
        >>> weight_EOD = torch.tensor([[[1.0]], [[10.0]]])
        >>> grouped_mm(torch.tensor([[2.0], [3.0]]), weight_EOD, plan, gather=True, scatter=True).tolist()
        [[20.0], [3.0]]
    """
    _check(x, weight_EOD, plan, gather, bias_EO, weights, activation, gated, residual)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        weight_EOD = weight_EOD.to(dtype)
    added, x = None, x.to(weight_EOD.dtype)
    if dtype != x.dtype:
        # the result is not of the product's dtype: there the residual would be rounded twice
        added, residual = residual, None
    bias_EO = None if bias_EO is None else bias_EO.to(weight_EOD.dtype)
    options = {"gather": gather, "scatter": scatter, "activation": activation, "gated": gated}
    name = grouped_backend("grouped_mm", backend, plan.num_pairs, (weight_EOD,), x, bias_EO)
    if name == "reference":
        y = reference.grouped_mm(x, weight_EOD, plan, bias_EO=bias_EO, weights=weights, residual=residual, **options)
    elif torch.compiler.is_compiling():
        weights_P = None if weights is None else weights.reshape(-1)
        y = grouped_mm_op(
            x,
            weight_EOD,
            bias_EO,
            weights_P,
            residual,
            plan.token_P,
            plan.expert_P,
            plan.num_tokens,
            plan.slots or 0,
            gather,
            scatter,
            activation or "",
            gated,
            backend,
        )
    else:
        weights_P = None if weights is None else weights.reshape(-1)
        more = (plan, gather, scatter, activation, gated, name)
        y = GroupedMM.apply(x, weight_EOD, bias_EO, weights_P, residual, *more)
    return y.to(dtype) if added is None else (y + added).to(dtype)


def _check(
    x: Tensor,
    weight_EOD: Tensor,
    plan: RoutePlan,
    gather: bool,
    bias_EO: Tensor | None,
    weights: Tensor | None,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
) -> None:
    check_float("grouped_mm", "weight_EOD", weight_EOD, 3)
    check_float("grouped_mm", "x", x, 2)
    E, O, D = weight_EOD.shape
    check_shape("grouped_mm", "weight_EOD", weight_EOD, (plan.num_experts, None, None), "the plan's num_experts first")
    rows, why = (plan.num_tokens, "the plan's tokens") if gather else (plan.num_pairs, "the plan's pairs")
    check_shape("grouped_mm", "x", x, (rows, D), f"{why}, weight's last size")
    if bias_EO is not None:
        check_float("grouped_mm", "bias_EO", bias_EO, 2)
        check_shape("grouped_mm", "bias_EO", bias_EO, (E, O), "first two sizes of the weight")
    if weights is not None:
        check_float("grouped_mm", "weights", weights, weights.dim())
        if weights.numel() != plan.num_pairs:
            raise fail("grouped_mm", "weights", f"{weights.numel()} values", f"{plan.num_pairs}", "Pass one a pair")
    if activation is not None and activation not in ACTIVATIONS:
        raise fail("grouped_mm", "activation", repr(activation), f"one of {sorted(ACTIVATIONS)}", "Pass one of them")
    if gated and (activation is None or O % 2):
        got = f"gated with activation {activation!r} and O = {O}"
        raise fail("grouped_mm", "gated", got, "an activation and an even O", "Stack gate and up along O")
    if residual is not None:
        check_float("grouped_mm", "residual", residual, 2)
        expected = (plan.num_pairs, O // 2 if gated else O)
        check_shape("grouped_mm", "residual", residual, expected, "shape of the result")
    check_device("grouped_mm", x.device, weight_EOD=weight_EOD, bias_EO=bias_EO, weights=weights, residual=residual)
    check_plan_device("grouped_mm", x.device, plan)
