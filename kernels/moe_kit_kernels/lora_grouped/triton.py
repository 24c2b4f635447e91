"""Triton kernel of LoRA on every expert: the base product, continued over the rank in the same accumulator.

    y_p = [x_p | h_p] [W_e | B_e]^T   with h = s x A^T made once before, `[P, L]`

The rank is a K-extension of at most a few steps; y is written once, and `x A^T` is not made again for every column tile.
The same kernel gives `dx = [dy | U] [W^T | A^T]^T`, with strides swapped. Helpers and tile map are those of `grouped_mm`.

Shapes: P sorted rows, D contraction width, L rank, O width out, BM x BN x BK tiles, BL the rank's tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_kit_kernels import tuning
from moe_kit_kernels.common.device import on_its_device
from moe_kit_kernels.grouped_mm import launch, launch_sums
from moe_kit_kernels.grouped_mm.triton import _product, _tile
from moe_kit_kernels.route_plan import RoutePlan


@triton.jit
def lora_grouped_kernel(
    x_ptr,
    w_ptr,
    h_ptr,
    b_ptr,
    y_ptr,
    source_ptr,
    target_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles,
    num_experts,
    D,
    L,
    O,
    stride_xm,
    stride_we,
    stride_wo,
    stride_wd,
    stride_be,
    stride_bo,
    stride_bl,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_L: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One [BM, BN] tile of the result."""
    expert, start, end, column = _tile(tile_expert_ptr, tile_start_ptr, tile_end_ptr, num_tiles, tl.cdiv(O, BN), GROUP)
    if expert < 0:
        return
    rows = start + tl.arange(0, BM)
    mask_m = rows < end
    offs_n = column * BN + tl.arange(0, BN)
    mask_n = offs_n < O
    y = tl.zeros((BM, BN), dtype=tl.float32)
    if expert < num_experts:
        source = rows
        if GATHER:
            source = tl.load(source_ptr + rows, mask=mask_m, other=0)
        columns = offs_n.to(tl.int64)
        w_columns = w_ptr + expert.to(tl.int64) * stride_we + columns * stride_wo
        x_rows = x_ptr + source.to(tl.int64) * stride_xm
        y = _product(x_rows, w_columns, mask_m, mask_n, D, 1, stride_wd, EVEN_D, PRECISION, BM, BN, BK)
        b_columns = b_ptr + expert.to(tl.int64) * stride_be + columns * stride_bo
        h_rows = h_ptr + rows.to(tl.int64) * L
        y += _product(h_rows, b_columns, mask_m, mask_n, L, 1, stride_bl, EVEN_L, PRECISION, BM, BN, BL)
    target = rows
    if SCATTER:
        target = tl.load(target_ptr + rows, mask=mask_m, other=0)
    y_ptrs = y_ptr + target.to(tl.int64)[:, None] * O + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@on_its_device
def product(
    x: Tensor, weight_EOD: Tensor, h_PL: Tensor, B_EOL: Tensor, plan: RoutePlan, gather: bool, scatter: bool
) -> Tensor:
    """Return `x W^T + h B^T`, `[P, O]`, sorted or in the given order with `scatter`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    h_PL = h_PL.contiguous()
    P, (_, O, D), L = plan.num_pairs, weight_EOD.shape, B_EOL.shape[2]
    y_PO = x.new_empty(P, O)
    if P == 0:
        return y_PO
    tiles = launch.plan_tiles(plan)
    aligned = launch.aligned(x, weight_EOD, B_EOL, h_PL, y_PO)
    sizes = {"width_in": D, "width_out": O, "rows": tiles.rows, "gated": False, "rank": L}
    tile = tuning.lookup("lora_grouped", x.device, **sizes, itemsize=x.element_size(), aligned=aligned)
    block_l = min(tile["BK"], max(16, triton.next_power_of_2(L)))
    lora_grouped_kernel[(tiles.num_tiles * triton.cdiv(O, tile["BN"]),)](
        x,
        weight_EOD,
        h_PL,
        B_EOL,
        y_PO,
        plan.sorted_token_P,
        plan.order_P,
        tiles.expert_G,
        tiles.start_G,
        tiles.end_G,
        tiles.num_tiles,
        plan.num_experts,
        D,
        L,
        O,
        x.stride(0),
        *weight_EOD.stride(),
        *B_EOL.stride(),
        GATHER=gather,
        SCATTER=scatter,
        EVEN_D=D % tile["BK"] == 0,
        EVEN_L=L % block_l == 0,
        PRECISION=launch.precision(x.dtype),
        BM=tiles.rows,
        BN=tile["BN"],
        BK=tile["BK"],
        BL=block_l,
        GROUP=tile["GROUP"],
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return y_PO


def plain(x: Tensor, weight_EOD: Tensor, plan: RoutePlan, gather: bool) -> Tensor:
    """Return `x W^T` of sorted rows, `[P, O]`."""
    return launch.product(x, weight_EOD, plan, launch.plan_tiles(plan), gather=gather)[0]


def gram(dz_PO: Tensor, x: Tensor, like_EOD: Tensor, plan: RoutePlan, gather: bool) -> Tensor:
    """Return `dz^T x` of every expert, `[E, O, D]`."""
    return launch_sums.gram(dz_PO, x, like_EOD, plan, gather_x=gather)[0]


def combine(dx_PD: Tensor, plan: RoutePlan) -> Tensor:
    """Return the sum of every token's sorted rows, `[T, D]`."""
    return launch_sums.combine(dx_PD, plan)
