"""Autograd function of the feed-forward experts; `native.py`, `cpu.py` and `triton.py` offer `forward` and `backward`."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.experts_mlp import cpu, native
from moe_kit_kernels.experts_mlp.call import Call, Needs


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
    def forward(ctx, backend: str, *call: Any) -> Tensor:
        """Return the result `[T, D]` of a `Call`, given field by field."""
        given = Call(*call)
        y_TD, z_PF = implementation(backend).forward(given, any(ctx.needs_input_grad))
        ctx.save_for_backward(given.x_TD, given.up_EFD, given.down_EDH, given.weights_P, given.down_bias_ED, z_PF)
        ctx.plan, ctx.activation, ctx.backend = given.plan, given.activation, backend
        return y_TD

    @staticmethod
    @first_order
    def backward(ctx, dy_TD: Tensor):
        """Return the gradients of x, up, down, weights and the biases."""
        x_TD, up_EFD, down_EDH, weights_P, down_bias_ED, z_PF = ctx.saved_tensors
        call = Call(x_TD, up_EFD, down_EDH, ctx.plan, weights_P, None, down_bias_ED, ctx.activation)
        # in the order of Call, whose fourth is the plan
        _, x, up, down, _, weights, up_bias, down_bias, _ = ctx.needs_input_grad
        needs = Needs(x, up, down, weights, up_bias, down_bias)
        dx, d_up, d_down, *others = implementation(ctx.backend).backward(call, dy_TD, z_PF, needs)
        return None, dx, d_up, d_down, None, *others, None
