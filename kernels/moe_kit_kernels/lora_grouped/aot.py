"""Variants of the LoRA-on-experts kernel for the ahead-of-time check."""

import itertools

from moe_kit_kernels.aot import Variant
from moe_kit_kernels.grouped_mm.aot import _INDEX, _SIZES, _TILES, default_config
from moe_kit_kernels.lora_grouped.triton import lora_grouped_kernel


def variants(arch: str) -> list[Variant]:
    """Return the forward at two row heights, dX, odd widths, and the same in float32.

    Args:
        arch: Architecture; tiles are cut to its shared memory.

    Returns:
        Eight variants.
    """
    found = []
    shapes = (
        ("aligned-128", 128, 2048, 1536, 64, False),
        ("aligned-16", 16, 2048, 1536, 16, False),
        ("dx-128", 128, 1536, 2048, 16, True),
        ("odd-128", 128, 1001, 333, 5, False),
    )
    for dtype, (shape, rows, D, O, L, transposed) in itertools.product(_SIZES, shapes):
        name = shape if dtype == "bf16" else f"{dtype}-{shape}"
        wide = shape != "odd-128"
        tile = default_config("lora_grouped", rows, arch, False, wide, _SIZES[dtype])
        block_l = min(tile["BK"], max(16, 1 << (L - 1).bit_length()))
        w_strides = {"stride_wo": 1, "stride_wd": O} if transposed else {"stride_wo": D, "stride_wd": 1}
        b_strides = {"stride_bo": 1, "stride_bl": O} if transposed else {"stride_bo": L, "stride_bl": 1}
        found.append(
            Variant(
                kernel="lora_grouped",
                name=name,
                function=lora_grouped_kernel,
                pointers={
                    **dict.fromkeys(("x_ptr", "w_ptr", "h_ptr", "b_ptr", "y_ptr"), f"*{dtype}"),
                    **_INDEX,
                    **_TILES,
                },
                integers={
                    "num_tiles": 300,
                    "num_experts": 64,
                    "D": D,
                    "L": L,
                    "O": O,
                    "stride_xm": D,
                    "stride_we": O * D,
                    **w_strides,
                    "stride_be": O * L,
                    **b_strides,
                },
                constants={
                    "GATHER": not transposed,
                    "SCATTER": False,
                    "EVEN_D": D % tile["BK"] == 0,
                    "EVEN_L": L % block_l == 0,
                    "PRECISION": "ieee",
                    "BM": rows,
                    "BN": tile["BN"],
                    "BK": tile["BK"],
                    "BL": block_l,
                    "GROUP": tile["GROUP"],
                },
                num_warps=tile["num_warps"],
                num_stages=tile["num_stages"],
                tile_rows=0 if dtype == "fp32" else rows,
                wide_loads=wide,
            )
        )
    return found
