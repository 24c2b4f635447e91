"""Whether the Triton kernels serve a call, and the call of them; Triton itself is imported by the first call that needs it.

Legend: T tokens, K slots a token, E experts, D width in, O width out, L rank.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.common.device import has_triton
from moe_kit_kernels.cost_model import Device, LoraShape, device_of, linear_seconds
from moe_kit_kernels.grouped_mm.backend import interpreting, resolve_backend
from moe_kit_kernels.route_plan import RoutePlan


def runs_on_kernels(plan: RoutePlan | None, x: Tensor) -> bool:
    """Tell whether the kernels take a call, on a device that they serve.

    Args:
        plan: the routing, if the caller made a plan; ids and all experts are tables anyway.
        x: the first input.

    Returns:
        False for free pairs and for float64, which run as plain GEMMs.
    """
    return (plan is None or plan.slots is not None) and x.dtype is not torch.float64


def check_triton(operator: str, plan: RoutePlan | None, x: Tensor) -> None:
    """Check that the kernels can run where they were asked for by name.

    Args:
        operator: public name, for messages.
        plan: the routing, if the caller made a plan.
        x: the first input.

    Raises:
        KernelError: no Triton or no GPU, free pairs, or float64.
    """
    resolve_backend(operator, "triton", x.device)
    fix = 'Pass backend="auto", which runs plain PyTorch here'
    if plan is not None and plan.slots is None:
        raise fail(operator, "backend", "'triton' with free pairs", "a plan of a [T, K] table", fix)
    if x.dtype is torch.float64:
        raise fail(operator, "backend", "'triton' with float64", "float32, bfloat16 or float16", fix)


# the environment and the installed packages are looked at once
@lru_cache(maxsize=16)
def uses_triton(device: torch.device) -> bool:
    """Tell whether the Triton kernels serve a device.

    Args:
        device: where the inputs live.

    Returns:
        True on a GPU with Triton installed, and everywhere under Triton's interpreter (`TRITON_INTERPRET=1`).
    """
    return (device.type == "cuda" or interpreting()) and has_triton()


def run_triton(
    how: str,
    plan: RoutePlan,
    scale: float,
    x_TD: Tensor,
    weights: Tensor,
    base_TO: Tensor | None,
    A_ELD: Tensor,
    B_EOL: Tensor,
) -> Tensor:
    """Run one bank on the Triton kernels.

    Args:
        how: "dense", "sorted" or "decode".
        plan: the routing, from a [T, K] table.
        scale: factor on the sum.
        x_TD: [T, D] inputs.
        weights: [T, K].
        base_TO: [T, O] or None.
        A_ELD: [E, L, D].
        B_EOL: [E, O, L].

    Returns:
        [T, O].
    """
    # Triton is imported by the first call that needs it
    from moe_kit_kernels.lora_experts import launch
    from moe_kit_kernels.lora_experts.triton_autograd import TritonLora

    weights = weights.view(plan.num_tokens, plan.slots)
    if how == "decode":
        return launch.decode(x_TD, A_ELD, B_EOL, plan, weights.float(), scale, base_TO)
    return TritonLora.apply(how, plan, scale, False, x_TD, weights, base_TO, None, A_ELD, B_EOL)


def linear_fuses(
    plan: RoutePlan | None, A: Sequence[Tensor], autocast: torch.dtype | None, widths_out: Sequence[int] = ()
) -> bool:
    """Tell whether the kernel with the base product inside should run, by `cost_model.linear_seconds`.

    It saves a read and a write of y, but its tiles are bound by L2 where the vendor's GEMM is not: it wins only where the
    input is so narrow that y is most of what moves.

    Args:
        plan: the routing.
        A: down projections.
        autocast: the autocast dtype, or None.
        widths_out: O of each projection; that of the input where the caller does not say, since both sides scale with O.

    Returns:
        True for a table of ids outside of autocast where every projection is modelled to gain.
    """
    if plan is None or plan.slots is None or autocast is not None:
        return False
    widths = widths_out or [a.shape[2] for a in A]
    device, training = device_of(A[0].device), torch.is_grad_enabled()
    return all(
        _fuses(plan.num_tokens, plan.num_pairs, *a.shape, O, a.element_size(), device, training)
        for a, O in zip(A, widths, strict=True)
    )


# the sizes repeat, and the model costs as much as a launch
@lru_cache(maxsize=1024)
def _fuses(T: int, P: int, E: int, L: int, D: int, O: int, itemsize: int, device: Device, training: bool) -> bool:
    # under the interpreter there is no GPU whose time could be modelled
    if device.host_walk:
        return False
    shape = LoraShape(tokens=T, pairs=P, experts=E, rank=L, d_in=D, d_out=O, itemsize=itemsize)
    seconds = linear_seconds(shape, device, training=training)
    return seconds["fused"] < seconds["separate"]
