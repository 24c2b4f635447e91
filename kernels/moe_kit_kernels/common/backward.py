"""What the backward of every hand-written autograd function has in common."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.autocast import no_autocast
from moe_kit_kernels.common.checks import fail


class _FirstDerivative(torch.autograd.Function):
    """The identity, whose own derivative raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        got, fix = "one through its gradient", "Leave out create_graph=True, or pass backend='reference'"
        raise fail("backward", "the derivative", got, "first derivatives only", fix)


def first_order(backward: Callable) -> Callable:
    """Decorate the `backward` of an autograd function: the dtypes of its forward hold, and there is no second derivative.

    A `loss.backward()` inside an autocast region would cast the operands of some products and not of others. And a kernel's
    gradient has no graph: with `create_graph=True` it would count as a constant, silently.

    Args:
        backward: takes the context and the gradients of the results.

    Returns:
        The same for use under `@staticmethod`; differentiating its results raises `KernelError`.
    """

    @functools.wraps(backward)
    def plain(ctx: Any, *gradients: Any) -> Any:
        device = next((gradient.device for gradient in gradients if gradient is not None), None)
        graph = torch.is_grad_enabled()
        if not graph and (device is None or not torch.is_autocast_enabled(device.type)):
            return backward(ctx, *gradients)
        with torch.no_grad(), no_autocast(device or torch.device("cpu")):
            found = backward(ctx, *gradients)
        if not graph:
            return found
        mark = lambda g: g if g is None else _FirstDerivative.apply(g.detach().requires_grad_())  # noqa: E731
        return tuple(map(mark, found)) if isinstance(found, tuple) else mark(found)

    return plain
