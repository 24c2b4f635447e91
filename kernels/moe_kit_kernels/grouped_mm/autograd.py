"""Autograd function of the grouped GEMM; all implementations offer the same three steps (`native.py`, `cpu.py`, `triton_rows.py`).

    dz = dact(weight_p * dy_p);  dW_e = dz^T x;  db_e = sum dz;  dx = dz W_e;  dweight_p = <dy_p, act(z_p)>

Saved: x (shared with the caller), the weight, and the pre-activations z only where an activation or the gradient of the
weights needs them.
"""

from types import ModuleType

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.grouped_mm import cpu, native
from moe_kit_kernels.grouped_mm.activations import activate_backward
from moe_kit_kernels.route_plan import RoutePlan


def implementation(backend: str) -> ModuleType | cpu.Steps:
    """Return what runs a backend.

    Args:
        backend: "native", "cpu" or "triton", as `grouped_backend` gave it.

    Returns:
        The steps of `native` or `cpu`, or the module `triton_rows`, which the first call that needs it imports.
    """
    if backend == "triton":
        from moe_kit_kernels.grouped_mm import triton_rows

        return triton_rows
    return native.STEPS if backend == "native" else cpu.STEPS


class GroupedMM(torch.autograd.Function):
    """`residual + weights * act(x W_e^T + b_e)` over the pairs of a plan."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight_EOD: Tensor,
        bias_EO: Tensor | None,
        weights_P: Tensor | None,
        residual: Tensor | None,
        plan: RoutePlan,
        gather: bool,
        scatter: bool,
        activation: str | None,
        gated: bool,
        backend: str,
    ) -> Tensor:
        """Return `[P, O]` rows, sorted or in the given order."""
        needs_z = needs_rows(activation, weights_P, ctx.needs_input_grad[3])
        y_PO, z_PF = implementation(backend).rows(
            x,
            weight_EOD,
            plan,
            gather=gather,
            scatter=scatter,
            bias_EO=bias_EO,
            weights_P=weights_P,
            residual=residual,
            activation=activation,
            gated=gated,
            keep=needs_z and any(ctx.needs_input_grad),
        )
        ctx.save_for_backward(x, weight_EOD, weights_P, z_PF)
        ctx.options = plan, gather, scatter, activation, gated, backend
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y_PO

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor):
        """Return the gradients of x, weight, bias, weights and residual."""
        needs = ctx.needs_input_grad[:5]
        x, weight_EOD, weights_P, z_PF = ctx.saved_tensors
        found = gradients(dy, x, weight_EOD, weights_P, z_PF, *ctx.options, needs=needs[:4])
        return *found, dy.to(ctx.residual_dtype) if needs[4] else None, *[None] * 6


def needs_rows(activation: str | None, weights_P: Tensor | None, need_weights: bool) -> bool:
    """Tell whether the gradients read the pre-activations.

    Args:
        activation: As in the public operator.
        weights_P: Flat weights or None.
        need_weights: Whether the weights want a gradient.

    Returns:
        False for a plain product.
    """
    return activation is not None or (weights_P is not None and need_weights)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight_EOD: Tensor,
    weights_P: Tensor | None,
    z_PF: Tensor | None,
    plan: RoutePlan,
    gather: bool,
    scatter: bool,
    activation: str | None,
    gated: bool,
    backend: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients that are asked for.

    Args:
        dy: Gradient of the result.
        x: As in the forward.
        weight_EOD: As in the forward.
        weights_P: As in the forward.
        z_PF: Pre-activations in sorted order, where `needs_rows` says so.
        plan: The routing.
        gather: As in the forward.
        scatter: As in the forward.
        activation: As in the forward.
        gated: As in the forward.
        backend: As in the forward.
        needs: Which of x, weight, bias and weights want a gradient.

    Returns:
        Their gradients; None where not wanted.
    """
    run = implementation(backend)
    need_x, need_weight, need_bias, need_weights = needs
    dy_PO = dy.index_select(0, plan.order_P) if scatter else dy.contiguous()
    dz_PF, y_PO = dy_PO, z_PF
    if weights_P is not None:
        dz_PF = (dy_PO * weights_P.index_select(0, plan.order_P)[:, None]).to(dy_PO.dtype)
    if activation is not None:
        dh_PO, dz_PF = dz_PF, torch.empty_like(z_PF)
        y_PO = activate_backward(dh_PO, z_PF, activation, gated, dz_PF)
    dx = d_weights = None
    if need_weights:
        dot_P = torch.linalg.vecdot(dy_PO.to(weights_P.dtype), y_PO.to(weights_P.dtype))
        dropped_P = plan.sorted_expert_P == plan.num_experts
        d_weights = dot_P.masked_fill(dropped_P, 0).index_select(0, plan.inverse_P)
    if need_x:
        dx = run.grad_rows(dz_PF, weight_EOD, plan, gather)
    dw, db = run.grad_stacks(dz_PF, x, weight_EOD, plan, gather, need_weight, need_bias)
    return dx, dw, db, d_weights
