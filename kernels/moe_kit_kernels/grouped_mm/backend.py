"""Which implementation of an operator runs, and why another one cannot: one function shared by the grouped operators.

`auto` never fails: it takes Triton for tensors on a GPU that Triton can compile for, the plain PyTorch path otherwise.
An implementation that was asked for by name and cannot run here is an error that says what runs instead.
"""

import importlib.util
import os

import torch

from moe_kit_kernels.errors import KernelError

BACKENDS = ("auto", "cpu", "triton", "reference")


def interpreting() -> bool:
    """Return whether Triton's interpreter was asked for (`TRITON_INTERPRET=1`): kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve_backend(operator: str, backend: str, device: torch.device) -> str:
    """Return the implementation to run: `"cpu"` (plain PyTorch), `"triton"` or `"reference"`.

    Args:
        operator: Name used in messages.
        backend: One of `BACKENDS`.
        device: Device of the operator's inputs.

    Returns:
        A member of `BACKENDS` other than `"auto"`.

    Raises:
        KernelError: `backend` is unknown, or `"triton"` was asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise KernelError(f"{operator}: backend {backend!r} is unknown; expected one of {BACKENDS}")
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton else "cpu"
    if backend == "triton":
        if not has_triton:
            raise KernelError(
                f'{operator}: backend "triton" needs the triton package, which is not installed; '
                'install it, or pass backend="auto", which runs the plain PyTorch path'
            )
        if device.type != "cuda" and not interpreting():
            raise KernelError(
                f'{operator}: backend "triton" needs tensors on a CUDA device, got {device}; move them there, or pass '
                'backend="auto", which runs the plain PyTorch path (TRITON_INTERPRET=1 runs the kernels in the '
                "interpreter, for tests only)"
            )
    return backend
