"""Which implementation of an operator runs, and why another one cannot: shared by the grouped operators.

`auto` never fails: it takes Triton for tensors on a GPU, compiled or tuned plain PyTorch code on the CPU, and the reference on
any other device. An implementation that was asked for by name and cannot run here is an error that says what runs instead.
"""

import os

import torch
from torch import Tensor

from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.common.device import has_triton
from moe_kit_kernels.cost_model import native_rows_pay
from moe_kit_kernels.grouped_mm import native

BACKENDS = ("auto", "cpu", "triton", "reference")
GROUPED_BACKENDS = ("auto", "native", "cpu", "triton", "reference")


def interpreting() -> bool:
    """Return whether Triton's interpreter was asked for (`TRITON_INTERPRET=1`): kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def grouped_backend(
    operator: str, backend: str, pairs: int, stacks: tuple[Tensor, ...], x: Tensor, *tensors: Tensor | None
) -> str:
    """Return the implementation to run of an operator that has C++ for the CPU.

    Args:
        operator: Name used in messages.
        backend: One of `GROUPED_BACKENDS`.
        pairs: P.
        stacks: The experts' matrices, `[E, O, D]` each.
        x: The operator's rows.
        *tensors: Its other tensors of floats; None is skipped.

    Returns:
        A member of `GROUPED_BACKENDS` other than `"auto"`, which takes `"native"` where that serves and pays.

    Raises:
        KernelError: `backend` is unknown, or an implementation was asked for that cannot run these tensors.
    """
    name = resolve_backend(operator, backend, x.device, backends=GROUPED_BACKENDS)
    if torch.compiler.is_compiling():
        # the operator in the graph asks again, with tensors that hold numbers
        return name
    if name == "native":
        native.check(operator, stacks, x, *tensors)
    if backend != "auto" or name != "cpu":
        return name
    pays = native_rows_pay(pairs, stacks[0].shape[0], *(size for stack in stacks for size in stack.shape[1:]))
    return "native" if pays and native.serves(stacks, x, *tensors) else name


def resolve_backend(
    operator: str, backend: str, device: torch.device, *, portable: bool = False, backends: tuple[str, ...] = BACKENDS
) -> str:
    """Return the implementation to run: `"cpu"` (tuned plain PyTorch), `"triton"`, `"reference"`, or what else was asked for.

    Args:
        operator: Name used in messages.
        backend: One of `backends`.
        device: Device of the operator's inputs.
        portable: The plain PyTorch path of this operator runs on every device, not only on the CPU.
        backends: What the operator offers.

    Returns:
        A member of `backends` other than `"auto"`.

    Raises:
        KernelError: `backend` is unknown, or an implementation was asked for that cannot run on `device`.
    """
    if backend not in backends:
        raise fail(operator, "backend", repr(backend), f"one of {backends}", 'Pass backend="auto"')
    plain = "cpu" if portable or device.type == "cpu" else "reference"
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton() else plain
    if backend == "triton":
        if not has_triton():
            raise fail(
                operator,
                "backend",
                "'triton'",
                "an installed triton package, which is missing",
                f'Install triton, or pass backend="auto", which runs "{plain}" here',
            )
        if device.type != "cuda" and not interpreting():
            raise fail(
                operator,
                "backend",
                f"'triton' with tensors on {device}",
                "tensors on a CUDA device (or TRITON_INTERPRET=1, for tests)",
                f'Move them to a GPU, or pass backend="auto", which runs "{plain}" here',
            )
    if backend == "cpu" and plain != "cpu":
        raise fail(operator, "backend", f"'cpu' with tensors on {device}", "tensors on the CPU", 'Pass backend="auto"')
    return backend
