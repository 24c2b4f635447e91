"""The launches that `warm_up` times: each grouped kernel alone, on one block's sizes with a uniform random routing."""

from collections.abc import Callable

import torch
import triton as _triton

from moe_kit_kernels.grouped_mm import launch, launch_sums
from moe_kit_kernels.route_plan import route_plan


def measure_block(
    best: Callable,
    tokens: int,
    experts: int,
    top_k: int,
    width: int,
    hidden: int,
    gated: bool,
    dtype: torch.dtype,
) -> None:
    """Call `best(kernel, rows, run, (width_in, width_out), gated)` for every kernel of a block.

    Args:
        best: Times candidates with `run`, which returns milliseconds.
        tokens: T.
        experts: E.
        top_k: K.
        width: D.
        hidden: H.
        gated: Whether the first stack holds gate and up.
        dtype: Of activations and weights.
    """
    device = "cuda"
    ids = torch.rand(tokens, experts, device=device).topk(top_k).indices
    plan = route_plan(ids, experts)
    tiles = launch.plan_tiles(plan)
    weights_P = torch.rand(tokens * top_k, device=device)
    F = 2 * hidden if gated else hidden
    x_TD = torch.randn(tokens, width, device=device, dtype=dtype)
    up_EFD = torch.randn(experts, F, width, device=device, dtype=dtype)
    down_EDH = torch.randn(experts, width, hidden, device=device, dtype=dtype)
    h_PH = torch.randn(tokens * top_k, hidden, device=device, dtype=dtype)
    z_PF = torch.randn(tokens * top_k, F, device=device, dtype=dtype)

    def timed(function: Callable) -> Callable[[], float]:
        return lambda: _triton.testing.do_bench(function, quantiles=[0.5])

    def first():
        return launch.product(x_TD, up_EFD, plan, tiles, gather=True, activation="silu", gated=gated, keep=True)

    def through():
        options = {"gather": True, "activation": "silu", "gated": gated}
        return launch.through_activation(x_TD, down_EDH, z_PF, weights_P, plan, tiles, **options)

    best("grouped_mm", tiles.rows, timed(first), (width, hidden if gated else F), gated)
    best("grouped_mm", tiles.rows, timed(lambda: launch.product(h_PH, down_EDH, plan, tiles)), (hidden, width), False)
    best("grouped_mm_dact", tiles.rows, timed(through), (width, hidden), gated)
    best(
        "grouped_gram",
        tiles.rows,
        timed(lambda: launch_sums.gram(z_PF, x_TD, up_EFD, plan, gather_x=True)),
        (width, F),
        False,
    )
