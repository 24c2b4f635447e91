"""Whether Triton is there, and the device that a kernel is launched on.

PyTorch's own operators switch to the device of their inputs; a Triton launch goes to the current device. In a model that is
spread over several GPUs (`device_map="auto"`) these are not the same.
"""

import functools
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Tell whether Triton is installed; looked up once, without importing it."""
    return find_spec("triton") is not None


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that launches kernels: they run on the device of its first tensor.

    Args:
        launch: takes at least one tensor by position.

    Returns:
        The same function; on the CPU, and where the device is the current one, nothing is switched.
    """

    @functools.wraps(launch)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return launch(*args, **kwargs)

    return guarded
