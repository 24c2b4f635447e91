"""What the backward of every hand-written autograd function has in common."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.autocast import autocast_dtype, no_autocast
from moe_kit_kernels.common.checks import fail


class _FirstDerivative(torch.autograd.Function):
    """`apply(gradient, *inputs)` -> the gradient, as a function of what it was computed from whose derivative raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        got, fix = "one through its gradient", "Leave out create_graph=True, or pass backend='reference'"
        raise fail("backward", "the derivative", got, "first derivatives only", fix)


class _Context:
    """A context whose saved tensors are unpacked once, which is all that a checkpoint allows."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def first_order(backward: Callable) -> Callable:
    """Decorate the `backward` of an autograd function: the dtypes of its forward hold, and there is no second derivative.

    A `loss.backward()` inside an autocast region would cast the operands of some products and not of others. And a kernel's
    gradient has no graph: with `create_graph=True` it would count as a constant, silently.

    Args:
        backward: takes the context and the gradients of the results.

    Returns:
        The same for use under `@staticmethod`; differentiating its results by anything that they depend on raises
        `KernelError`.
    """

    @functools.wraps(backward)
    def plain(ctx: Any, *gradients: Any) -> Any:
        device = next((gradient.device for gradient in gradients if gradient is not None), None)
        graph = torch.is_grad_enabled()
        if not graph and (device is None or autocast_dtype(device) is None):
            return backward(ctx, *gradients)
        context = _Context(ctx) if graph else ctx
        with torch.no_grad(), no_autocast(device or torch.device("cpu")):
            found = backward(context, *gradients)
        if not graph:
            return found
        inputs = [t for t in (*context.saved_tensors, *gradients) if t is not None and t.requires_grad]
        mark = lambda g: g if g is None else _FirstDerivative.apply(g, *inputs)  # noqa: E731
        return tuple(map(mark, found)) if isinstance(found, tuple) else mark(found)

    return plain
