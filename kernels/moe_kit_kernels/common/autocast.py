"""Autocast for hand-written autograd functions: cast once at the border, compute as told inside.

`torch.amp.custom_fwd` casts every floating tensor; routing weights must stay float32, so the border is written out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Tell which dtype GEMM inputs should be cast to.

    Args:
        device: where the operator runs.

    Returns:
        The autocast dtype of the device's kind, or None outside of autocast.
    """
    if not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)):
        return None
    return torch.get_autocast_dtype(device.type)


def cast_all(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Cast tensors differentiably; float64 and None pass through, as in autocast itself.

    Args:
        tensors: floating tensors or None.
        dtype: the autocast dtype.

    Returns:
        The cast tensors in the same order.
    """
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Switch autocast off, so that GEMMs with `out=` and mixed dtypes do what they say.

    Args:
        device: where the operator runs.

    Yields:
        Nothing.
    """
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield
