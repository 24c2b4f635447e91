"""Variants of the grouped kernels for the ahead-of-time check: the default tiles on model widths, and odd widths."""

from moe_kit_kernels import tuning
from moe_kit_kernels.aot import Variant
from moe_kit_kernels.grouped_mm.sizes import gram_tile, product_tile, split_block
from moe_kit_kernels.grouped_mm.triton import grouped_mm_dact_kernel, grouped_mm_kernel
from moe_kit_kernels.grouped_mm.triton_sums import combine_kernel, grouped_gram_kernel, split_sum_kernel

_SIZES = {"bf16": 2, "fp32": 4}
_INDEX = {"source_ptr": "*i64", "target_ptr": "*i64"}
_TILES = {"tile_expert_ptr": "*i32", "tile_start_ptr": "*i64", "tile_end_ptr": "*i64"}
_NUM_TILES, _EXPERTS = 300, 64


def default_config(
    kernel: str, rows: int, arch: str, gated: bool, aligned: bool = True, itemsize: int = 2
) -> dict[str, int]:
    """Return the default configuration as a launch on `arch` would take it."""
    limit = 65536 if arch == "gfx942" else tuning.SHARED_LIMIT[arch]
    config = tuning.find(kernel, "default", limit, 1, 1, rows, gated, itemsize=itemsize)
    if not aligned:
        config = tuning.narrow(config)
    return tuning.fit(config, rows, itemsize, gated, limit)


def variants(arch: str) -> list[Variant]:
    """Return the variants of the four kernels.

    Args:
        arch: Architecture; tiles are cut to its shared memory.

    Returns:
        Aligned variants at every row height, the transposed weight of dX, odd widths, and the same in float32, whose exact
        products use no matrix instruction.
    """
    found = []
    # the first of each kernel stands for it in quick checks: the tallest tile, which has most to lose
    for rows in (128, 64, 32, 16):
        found.append(_product(f"aligned-{rows}", arch, rows, 4096, 2048, gated=False))
        found.append(_product(f"gated-{rows}", arch, rows, 2048, 768, gated=True))
    found.append(_product("dx-128", arch, 128, 2048, 4096, gated=False, transposed=True))
    found.append(_product("odd-128", arch, 128, 1001, 333, gated=True, wide=False))
    # down projections of low ranks, scattered: forward, and the backward's B^T with its ranks or its width contiguous
    for rows in (16, 64, 128):
        for rank in (8, 16, 64):
            found.append(_product(f"down-{rank}-{rows}", arch, rows, 4096, rank, gated=False, scatter=True))
    for rank in (32, 64):
        # few experts of many rows
        found.append(_product(f"down-{rank}-256", arch, 256, 4096, rank, gated=False, scatter=True))
    for rank in (16, 64):
        more = {"gated": False, "scatter": True, "gather": True}
        found.append(_product(f"up-back-{rank}", arch, 128, 4096, rank, **more, transposed=True))
    found.append(_product("down-odd", arch, 128, 1001, 5, gated=False, scatter=True, wide=False))
    for rows in (128, 16):
        found.append(_dact(f"aligned-{rows}", arch, rows, 2048, 768))
    found.append(_dact("odd-128", arch, 128, 1001, 333, wide=False))
    for rows in (128, 16):
        found.append(_gram(f"aligned-{rows}", arch, rows, 2048, 1536))
        # gradients of low-rank factors: one side is narrow, and a hot expert is split
        found.append(_gram(f"down-{rows}", arch, rows, 4096, 16, split=True))
        found.append(_gram(f"up-{rows}", arch, rows, 16, 4096, split=True))
    found.append(_gram("up-transposed", arch, 128, 16, 4096, split=True, transposed=True))
    found.append(_split_sum("down", 16, 4096))
    found.append(_split_sum("up", 4096, 16))
    found.append(_split_sum("up-transposed", 4096, 16, transposed=True))
    found.append(_split_sum("odd", 1001, 5, wide=False))
    found.append(_gram("odd-128", arch, 128, 1001, 333, wide=False))
    for rows in (16, 64, 128):
        found.append(_product(f"fp32-{rows}", arch, rows, 4096, 2048, gated=False, dtype="fp32"))
        found.append(_product(f"fp32-gated-{rows}", arch, rows, 2048, 768, gated=True, dtype="fp32"))
    found.append(_product("fp32-32", arch, 32, 4096, 2048, gated=False, dtype="fp32"))
    found.append(_product("fp32-down-16", arch, 128, 4096, 16, gated=False, scatter=True, dtype="fp32"))
    found.append(_product("fp32-odd", arch, 128, 1001, 333, gated=True, wide=False, dtype="fp32"))
    found.append(_product("tf32-128", arch, 128, 4096, 2048, gated=False, dtype="fp32", precision="tf32"))
    for rows in (16, 128):
        found.append(_dact(f"fp32-{rows}", arch, rows, 2048, 768, dtype="fp32"))
        found.append(_gram(f"fp32-{rows}", arch, rows, 2048, 1536, dtype="fp32"))
    found.append(_gram("fp32-down", arch, 128, 4096, 16, split=True, dtype="fp32"))
    found.append(_gram("fp32-up", arch, 128, 16, 4096, split=True, dtype="fp32"))
    found.append(_gram("fp32-odd", arch, 128, 1001, 333, wide=False, dtype="fp32"))
    for name, width, slots in (("aligned", 4096, 8), ("odd", 1001, 8), ("pairs", 4096, 0)):
        pointers = {"rows_ptr": "*bf16", "y_ptr": "*bf16", "weight_ptr": "*fp32", "inverse_ptr": "*i64"}
        pointers |= {"order_ptr": "*i64", "token_offsets_ptr": "*i64", "total_ptr": "*i64"}
        found.append(
            Variant(
                kernel="combine",
                name=name,
                function=combine_kernel,
                pointers=pointers,
                integers={"O": width},
                constants={"SLOTS": slots, "WEIGHTS": True, "BN": 1024},
                wide_loads=name == "aligned",
            )
        )
    return found


def _product(
    name: str,
    arch: str,
    rows: int,
    D: int,
    O: int,
    *,
    gated: bool,
    transposed: bool = False,
    wide: bool = True,
    gather: bool | None = None,
    scatter: bool = False,
    dtype: str = "bf16",
    precision: str = "ieee",
) -> Variant:
    tile = product_tile(default_config("grouped_mm", rows, arch, gated, wide, _SIZES[dtype]), O)
    width = O * 2 if gated else O
    stride_o, stride_d = (1, width) if transposed else (D, 1)
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "z_ptr", "bias_ptr", "residual_ptr"), f"*{dtype}")
    return Variant(
        kernel="grouped_mm",
        name=name,
        function=grouped_mm_kernel,
        pointers={**pointers, "weight_ptr": "*fp32", **_INDEX, **_TILES},
        integers={
            "num_tiles": _NUM_TILES,
            "num_experts": _EXPERTS,
            "D": D,
            "O": O,
            "stride_xm": D,
            "stride_we": width * D,
            "stride_wo": stride_o,
            "stride_wd": stride_d,
            "stride_ym": O,
        },
        constants={
            "GATHER": not transposed if gather is None else gather,
            "SCATTER": scatter,
            "BIAS": not wide,
            "WEIGHTS": False,
            "RESIDUAL": not wide,
            "ACTIVATION": "silu" if gated else "",
            "GATED": gated,
            "KEEP": gated,
            "EVEN_D": D % tile["BK"] == 0,
            "PRECISION": precision,
            "BM": rows,
            "BN": tile["BN"],
            "BK": tile["BK"],
            "GROUP": tile["GROUP"],
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        tile_rows=0 if dtype == "fp32" and precision == "ieee" else rows,
        wide_loads=wide,
    )


def _dact(name: str, arch: str, rows: int, D: int, H: int, wide: bool = True, dtype: str = "bf16") -> Variant:
    tile = default_config("grouped_mm_dact", rows, arch, True, wide, _SIZES[dtype])
    pointers = dict.fromkeys(("dy_ptr", "w_ptr", "z_ptr", "dz_ptr", "wh_ptr"), f"*{dtype}")
    return Variant(
        kernel="grouped_mm_dact",
        name=name,
        function=grouped_mm_dact_kernel,
        pointers={**pointers, "weight_ptr": "*fp32", "dot_ptr": "*fp32", **_INDEX, **_TILES},
        integers={
            "num_tiles": _NUM_TILES,
            "num_experts": _EXPERTS,
            "D": D,
            "H": H,
            "stride_ym": D,
            "stride_we": D * H,
            "stride_wh": 1,
            "stride_wd": H,
        },
        constants={
            "GATHER": True,
            "ACTIVATION": "silu",
            "GATED": True,
            "EVEN_D": D % tile["BK"] == 0,
            "PRECISION": "ieee",
            "BM": rows,
            "BN": tile["BN"],
            "BK": tile["BK"],
            "GROUP": tile["GROUP"],
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        tile_rows=0 if dtype == "fp32" else rows,
        wide_loads=wide,
    )


def _split_sum(name: str, O: int, D: int, *, transposed: bool = False, wide: bool = True) -> Variant:
    stride_o, stride_d = (1, O) if transposed else (D, 1)
    return Variant(
        kernel="split_sum",
        name=name,
        function=split_sum_kernel,
        pointers={"part_ptr": "*fp32", "dw_ptr": "*bf16", "first_slot_ptr": "*i64"},
        integers={"O": O, "D": D, "stride_we": O * D, "stride_wo": stride_o, "stride_wd": stride_d},
        constants=dict(zip(("BO", "BD"), split_block(O, D))),
        wide_loads=wide,
    )


def _gram(
    name: str,
    arch: str,
    rows: int,
    D: int,
    O: int,
    wide: bool = True,
    *,
    split: bool = False,
    transposed: bool = False,
    dtype: str = "bf16",
) -> Variant:
    tile = gram_tile(default_config("grouped_gram", rows, arch, False, wide, _SIZES[dtype]), O, D)
    stride_o, stride_d = (1, O) if transposed else (D, 1)
    pointers = dict.fromkeys(("dz_ptr", "x_ptr", "dw_ptr", "db_ptr"), f"*{dtype}")
    pointers |= {"row_scale_ptr": "*fp32", "source_z_ptr": "*i64", "source_x_ptr": "*i64"}
    pointers |= {"chunk_expert_ptr": "*i32", "chunk_start_ptr": "*i64", "chunk_end_ptr": "*i64"}
    pointers |= {"first_slot_ptr": "*i64", "slot_ptr": "*i64", "part_w_ptr": "*fp32", "part_b_ptr": "*fp32"}
    return Variant(
        kernel="grouped_gram",
        name=name,
        function=grouped_gram_kernel,
        pointers=pointers,
        integers={
            **{"O": O, "D": D, "stride_zm": O, "stride_xm": D},
            **{"stride_we": O * D, "stride_wo": stride_o, "stride_wd": stride_d},
        },
        constants={
            "GATHER_Z": False,
            "GATHER_X": True,
            "BIAS": not wide,
            "SCALE": False,
            "SPLIT": split,
            "PRECISION": "ieee",
            "BO": tile["BO"],
            "BD": tile["BD"],
            "BR": tile["BR"],
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        tile_rows=0 if dtype == "fp32" else tile["BO"],
        wide_loads=wide,
    )
