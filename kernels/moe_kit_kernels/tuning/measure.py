"""The launches that `warm_up` times: each matrix kernel alone, on one layer's sizes with a uniform random routing."""

from collections.abc import Callable

import torch
import triton as _triton

from moe_kit_kernels.grouped_mm import launch, launch_sums
from moe_kit_kernels.lora_experts import launch as lora_launch
from moe_kit_kernels.lora_experts import tiles as lora_tiles
from moe_kit_kernels.lora_grouped import triton as lora_grouped
from moe_kit_kernels.route_plan import route_plan, tile_height


def _timed(function: Callable) -> Callable[[], float]:
    return lambda: _triton.testing.do_bench(function, quantiles=[0.5])


def _sizes(width_in: int, width_out: int, **more: int) -> dict[str, int]:
    return {"width_in": width_in, "width_out": width_out, **more}


def measure_block(
    best: Callable,
    tokens: int,
    experts: int,
    top_k: int,
    width: int,
    hidden: int,
    gated: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Call `best(kernel, rows, run, sizes, gated)` for every kernel of a block.

    Args:
        best: Times candidates with `run`, which returns milliseconds.
        tokens: T.
        experts: E.
        top_k: K.
        width: D.
        hidden: H.
        gated: Whether the first stack holds gate and up.
        dtype: Of activations and weights.
        device: The GPU.
    """
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

    def first():
        return launch.product(x_TD, up_EFD, plan, tiles, gather=True, activation="silu", gated=gated, keep=True)

    def through():
        options = {"gather": True, "activation": "silu", "gated": gated}
        return launch.through_activation(x_TD, down_EDH, z_PF, weights_P, plan, tiles, **options)

    def second():
        return launch.product(h_PH, down_EDH, plan, tiles)

    def weights():
        return launch_sums.gram(z_PF, x_TD, up_EFD, plan, gather_x=True)

    best("grouped_mm", tiles.rows, _timed(first), _sizes(width, hidden if gated else F), gated)
    best("grouped_mm", tiles.rows, _timed(second), _sizes(hidden, width))
    best("grouped_mm_dact", tiles.rows, _timed(through), _sizes(width, hidden), gated)
    best("grouped_gram", tiles.rows, _timed(weights), _sizes(width, F))


def measure_lora(
    best: Callable,
    tokens: int,
    experts: int,
    top_k: int,
    rank: int,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Call `best(kernel, rows, run, sizes, default=..., columns=...)` for every LoRA kernel of a linear layer.

    Args:
        best: Times candidates with `run`, which returns milliseconds.
        tokens: T.
        experts: E.
        top_k: K.
        rank: L.
        width: D.
        hidden: O.
        dtype: Of activations and weights.
        device: The GPU.
    """
    plan = route_plan(torch.rand(tokens, experts, device=device).topk(top_k).indices, experts)
    more = {"device": device, "dtype": dtype}
    x_TD, W_OD = torch.randn(tokens, width, **more), torch.randn(hidden, width, **more)
    A_ELD, B_EOL = torch.randn(experts, rank, width, **more), torch.randn(experts, hidden, rank, **more)
    H_PL, base_TO = torch.randn(tokens * top_k, rank, **more), torch.randn(tokens, hidden, **more)
    gates = {"weights": torch.rand(tokens, top_k, device=device)}

    size = dtype.itemsize
    down = lora_tiles.down_tile(tokens, experts, rank, size)
    EB, LP = lora_tiles.column_block(experts, rank)
    sizes = _sizes(width, experts * rank, rank=rank)
    run = _timed(lambda: lora_launch.down_dense(x_TD, A_ELD, plan))
    best("lora_down_dense", down["BM"], run, sizes, default=down, columns=EB * LP)

    for kernel, linear in (("lora_up_dense", None), ("lora_linear", (x_TD, W_OD, None))):
        capability = lora_launch.capability(device)
        options = {"linear": linear is not None, "capability": capability, "itemsize": size, "columns": experts * LP}
        up = lora_tiles.up_tile(tokens, hidden, top_k, **options)
        base = {"base_TO": base_TO} if linear is None else {"linear": linear}
        run = _timed(lambda base=base: lora_launch.up_dense(H_PL, B_EOL, plan, dtype, **gates, **base))
        best(kernel, up["BM"], run, _sizes(experts * rank, hidden, rank=rank), default=up)

    rows = tile_height(tokens, experts)
    run = _timed(lambda: lora_launch.up_sorted(H_PL, B_EOL, plan, dtype, **gates, base_TO=base_TO))
    default = lora_tiles.sorted_tile(rows, rank, size)
    best("lora_up_sorted", rows, run, _sizes(experts * rank, hidden, rank=rank), default=default)

    tiles = launch.plan_tiles(plan)
    stack_EOD = torch.randn(experts, hidden, width, **more)

    def low_rank():
        return launch.product(x_TD, A_ELD, plan, tiles, gather=True, scatter=True)

    def stacked():
        return lora_grouped.product(x_TD, stack_EOD, H_PL, B_EOL, plan, True, False)

    best("grouped_mm", tiles.rows, _timed(low_rank), _sizes(width, rank))
    best("lora_grouped", tiles.rows, _timed(stacked), _sizes(width, hidden, rank=rank))
