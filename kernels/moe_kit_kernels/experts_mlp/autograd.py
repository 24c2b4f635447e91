"""Autograd function of the feed-forward experts; `native.py`, `cpu.py` and `triton.py` offer `forward` and `backward`."""

from types import ModuleType

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.experts_mlp import cpu, native
from moe_kit_kernels.route_plan import RoutePlan


def implementation(backend: str) -> ModuleType:
    """Return the module that runs a backend.

    Args:
        backend: "native", "cpu" or "triton", as `grouped_backend` gave it.

    Returns:
        The module of that name; `triton` is imported by the first call that needs it.
    """
    if backend == "triton":
        from moe_kit_kernels.experts_mlp import triton

        return triton
    return native if backend == "native" else cpu


class ExpertsMLP(torch.autograd.Function):
    """Routed feed-forward experts; saves x, the stacks, the weights and the pre-activations `[P, F]`."""

    @staticmethod
    def forward(
        ctx,
        x_TD: Tensor,
        up_EFD: Tensor,
        down_EDH: Tensor,
        weights_P: Tensor,
        up_bias_EF: Tensor | None,
        down_bias_ED: Tensor | None,
        plan: RoutePlan,
        activation: str,
        backend: str,
    ) -> Tensor:
        """Return the result `[T, D]`."""
        y_TD, z_PF = implementation(backend).forward(
            x_TD, up_EFD, down_EDH, plan, weights_P, up_bias_EF, down_bias_ED, activation, any(ctx.needs_input_grad)
        )
        ctx.save_for_backward(x_TD, up_EFD, down_EDH, weights_P, down_bias_ED, z_PF)
        ctx.plan, ctx.activation, ctx.backend = plan, activation, backend
        return y_TD

    @staticmethod
    @first_order
    def backward(ctx, dy_TD: Tensor):
        """Return the gradients of x, up, down, weights and the biases."""
        x_TD, up_EFD, down_EDH, weights_P, down_bias_ED, z_PF = ctx.saved_tensors
        gradients = implementation(ctx.backend).backward(
            dy_TD,
            x_TD,
            up_EFD,
            down_EDH,
            ctx.plan,
            weights_P,
            down_bias_ED,
            z_PF,
            ctx.activation,
            ctx.needs_input_grad[:6],
        )
        return *gradients, None, None, None
