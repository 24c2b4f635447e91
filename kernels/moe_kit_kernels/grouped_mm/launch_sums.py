"""Launchers of the sums over rows: weight gradients, with a hot expert's rows split over programs, and the combine.

A weight gradient has `tiles x experts` programs, and an expert's loop is as long as its rows. Where the tiles alone fill the
GPU (full-size experts) the largest expert simply starts first. Where they do not (low-rank factors: a few tiles an expert),
one hot expert would keep a few programs busy while the others wait, so its rows are cut into chunks of bounded size; parts
go to a float32 workspace and are added in row order. All sizes follow from static ones.

Legend: T tokens, P pairs, E experts, O and D widths.
"""

from functools import lru_cache

import torch
import triton as _triton
from torch import Tensor

from moe_kit_kernels import tuning
from moe_kit_kernels.common.device import on_its_device
from moe_kit_kernels.grouped_mm import sizes
from moe_kit_kernels.grouped_mm.launch import aligned, precision, unit_stride
from moe_kit_kernels.grouped_mm.triton_sums import combine_kernel, grouped_gram_kernel, split_sum_kernel
from moe_kit_kernels.route_plan import RoutePlan, chunk_map, tile_height


@lru_cache(maxsize=16)
def _workers(device: torch.device) -> int:
    """Programs that run at once; the CPU stands for the interpreter, and for an H100's count."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@on_its_device
def gram(
    dz: Tensor,
    x: Tensor,
    weight_EOD: Tensor,
    plan: RoutePlan,
    *,
    gather_dz: bool = False,
    gather_x: bool = False,
    scale_P: Tensor | None = None,
    bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch `grouped_gram_kernel`, and `split_sum_kernel` where an expert may be split.

    Args:
        dz: `[P, O]` sorted, or `[T, O]` with `gather_dz`.
        x: `[P, D]` sorted, or `[T, D]` with `gather_x`.
        weight_EOD: The weight whose gradient this is; gives shape, dtype and memory layout.
        plan: The routing.
        gather_dz: dz is by token.
        gather_x: x is by token.
        scale_P: float32 factor of every sorted row of dz.
        bias: Also return the sum of dz over every expert's rows.

    Returns:
        dW `[E, O, D]` and db `[E, O]` or None.
    """
    dz, x = unit_stride(dz), unit_stride(x)
    E, O, D = weight_EOD.shape
    dw_EOD = torch.empty_like(weight_EOD)
    db_EO = weight_EOD.new_empty(E, O) if bias else None
    tile = tuning.lookup(
        "grouped_gram",
        dz.device,
        width_in=D,
        width_out=O,
        rows=tile_height(plan.num_pairs, E),
        gated=False,
        itemsize=dz.element_size(),
        aligned=aligned(dz, x, dw_EOD),
    )
    tile = sizes.gram_tile(tile, O, D)
    tiles = _triton.cdiv(O, tile["BO"]) * _triton.cdiv(D, tile["BD"])
    chunks = chunk_map(plan, sizes.chunk_rows(plan.num_pairs, tiles, _workers(dz.device)))
    split = chunks.num_slots > 0 and chunks.rows < plan.num_pairs
    slots = chunks.num_slots if split else 0
    parts_SOD = torch.empty(slots, O, D, dtype=torch.float32, device=dz.device)
    parts_SO = torch.empty(slots if bias else 0, O, dtype=torch.float32, device=dz.device)
    grouped_gram_kernel[(tiles, chunks.num_tiles)](
        dz,
        x,
        dw_EOD,
        db_EO if bias else dw_EOD,
        scale_P if scale_P is not None else plan.offsets_E1,
        plan.sorted_token_P,
        plan.sorted_token_P,
        chunks.expert_G,
        chunks.start_G,
        chunks.end_G,
        chunks.first_E1,
        chunks.slot_G,
        parts_SOD,
        parts_SO,
        O,
        D,
        dz.stride(0),
        x.stride(0),
        *dw_EOD.stride(),
        GATHER_Z=gather_dz,
        GATHER_X=gather_x,
        BIAS=bias,
        SCALE=scale_P is not None,
        SPLIT=split,
        PRECISION=precision(dz.dtype),
        BO=tile["BO"],
        BD=tile["BD"],
        BR=tile["BR"],
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    if split:
        _add_parts(parts_SOD, dw_EOD, chunks.first_E1)
        if db_EO is not None:
            _add_parts(parts_SO[:, :, None], db_EO[:, :, None], chunks.first_E1)
    return dw_EOD, db_EO


def _add_parts(parts_SOD: Tensor, dw_EOD: Tensor, first_E1: Tensor) -> None:
    E, O, D = dw_EOD.shape
    block_o, block_d = sizes.split_block(O, D)
    grid = (_triton.cdiv(O, block_o) * _triton.cdiv(D, block_d), E)
    split_sum_kernel[grid](parts_SOD, dw_EOD, first_E1, O, D, *dw_EOD.stride(), BO=block_o, BD=block_d, num_warps=4)


@on_its_device
def combine(rows_PO: Tensor, plan: RoutePlan, weights_P: Tensor | None = None) -> Tensor:
    """Launch `combine_kernel`: sum every token's sorted rows, each times its weight, in fp32 and slot order.

    Args:
        rows_PO: `[P, O]` sorted rows; those of dropped pairs are not read.
        plan: The routing.
        weights_P: Flat weights in the given order; None = 1.

    Returns:
        `[T, O]` of the rows' dtype.
    """
    T, O = plan.num_tokens, rows_PO.shape[1]
    y_TO = rows_PO.new_empty(T, O)
    if T == 0:
        return y_TO
    if plan.num_pairs == 0:
        return y_TO.zero_()
    block = min(1024, _triton.next_power_of_2(O))
    free = plan.slots is None
    combine_kernel[(T, _triton.cdiv(O, block))](
        rows_PO.contiguous(),
        y_TO,
        weights_P.contiguous() if weights_P is not None else rows_PO,
        plan.inverse_P,
        plan.token_order_P if free else plan.inverse_P,
        plan.token_offsets_T1 if free else plan.inverse_P,
        plan.offsets_E1[-1:],
        O,
        SLOTS=0 if free else plan.slots,
        WEIGHTS=weights_P is not None,
        BN=block,
        num_warps=4,
    )
    return y_TO
