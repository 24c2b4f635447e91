"""Argument checks of the operators: each failure says what, got, expected and how to fix it.

The checks read sizes, dtypes and devices only, never values, so they cost no wait for a device.
"""

import torch
from torch import Tensor

from moe_kit_kernels.errors import KernelError


def fail(operator: str, what: str, got: object, expected: str, fix: str) -> KernelError:
    """Build the error of an operator.

    Args:
        operator: public name of the operator.
        what: the argument or property at fault.
        got: what was passed; shown with `str`.
        expected: what the operator takes.
        fix: one imperative sentence.

    Returns:
        A `KernelError`, for the caller to raise.
    """
    return KernelError(f"{operator}: {what} is {got}, expected {expected}. {fix}.")


def check_float(operator: str, name: str, tensor: Tensor, dims: int) -> None:
    """Check that a tensor is floating point and has the wanted number of dimensions.

    Args:
        operator: public name of the operator.
        name: the argument's name.
        tensor: the argument.
        dims: number of dimensions it must have.

    Raises:
        KernelError: not a tensor, an integer dtype, or another number of dimensions.
    """
    if not isinstance(tensor, Tensor):
        raise fail(operator, name, type(tensor).__name__, f"a {dims}-D tensor", f"Pass {name} as a tensor")
    if not tensor.is_floating_point():
        raise fail(operator, f"dtype of {name}", tensor.dtype, "a floating-point dtype", f"Convert it: {name}.float()")
    if tensor.dim() != dims:
        raise fail(operator, f"shape of {name}", tuple(tensor.shape), f"{dims} dimensions", "Reshape it")


def check_shape(operator: str, name: str, tensor: Tensor, expected: tuple[int | None, ...], why: str) -> None:
    """Check a tensor's sizes; None stands for any size.

    Args:
        operator: public name of the operator.
        name: the argument's name.
        tensor: the argument.
        expected: sizes by dimension.
        why: where the expected sizes come from.

    Raises:
        KernelError: a size differs.
    """
    shape = tensor.shape
    if len(shape) != len(expected) or any(e is not None and e != s for s, e in zip(shape, expected)):
        wanted = "[" + ", ".join("any" if e is None else str(e) for e in expected) + "]"
        raise fail(operator, f"shape of {name}", list(shape), f"{wanted} ({why})", f"Pass {name} with that shape")


def check_device(operator: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Check that all tensors live on one device.

    Args:
        operator: public name of the operator.
        device: the device of the first argument.
        **tensors: the other arguments by name; None is skipped.

    Raises:
        KernelError: a tensor lives elsewhere.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise fail(operator, f"device of {name}", tensor.device, f"{device}", f"Move it: {name}.to('{device}')")
