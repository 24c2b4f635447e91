"""Which implementation of an operator runs, and why another one cannot: one function shared by the grouped operators.

`auto` never fails: it takes Triton for tensors on a GPU, the tuned plain PyTorch path on the CPU, and the reference on
any other device. An implementation that was asked for by name and cannot run here is an error that says what runs instead.
"""

import os

import torch

from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.common.device import has_triton

BACKENDS = ("auto", "cpu", "triton", "reference")


def interpreting() -> bool:
    """Return whether Triton's interpreter was asked for (`TRITON_INTERPRET=1`): kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve_backend(operator: str, backend: str, device: torch.device, *, portable: bool = False) -> str:
    """Return the implementation to run: `"cpu"` (tuned plain PyTorch), `"triton"` or `"reference"`.

    Args:
        operator: Name used in messages.
        backend: One of `BACKENDS`.
        device: Device of the operator's inputs.
        portable: The plain PyTorch path of this operator runs on every device, not only on the CPU.

    Returns:
        A member of `BACKENDS` other than `"auto"`.

    Raises:
        KernelError: `backend` is unknown, or an implementation was asked for that cannot run on `device`.
    """
    if backend not in BACKENDS:
        raise fail(operator, "backend", repr(backend), f"one of {BACKENDS}", 'Pass backend="auto"')
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
