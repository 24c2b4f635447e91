"""Variants of the LoRA kernels for the ahead-of-time check: model widths at usual ranks, and odd widths and ranks."""

from dataclasses import replace
from typing import Any

from moe_kit_kernels.aot import Variant
from moe_kit_kernels.lora_experts import tiles
from moe_kit_kernels.lora_experts import triton as kernels
from moe_kit_kernels.tuning import SHARED_LIMIT, fit

# pointer types of x (and what is in its dtype) and of the bank (and H); PEFT trains float32 banks on a bfloat16 base
_DTYPES = {"bf16": ("*bf16", "*bf16"), "fp32": ("*fp32", "*fp32"), "mixed": ("*bf16", "*fp32")}
_SIZES = {"*bf16": 2, "*fp32": 4}
_TILES = {"tile_expert_ptr": "*i32", "tile_start_ptr": "*i64", "tile_end_ptr": "*i64"}


def variants(arch: str) -> list[Variant]:
    """Return the variants of the five kernels.

    Args:
        arch: architecture; the tile of the base product depends on it.

    Returns:
        Aligned variants (4096 wide, bfloat16) at ranks 8 to 256, also with B in memory as [E, L, O] ("flat"), odd ones
        (1001 wide, rank 5), and the same in float32 and with a float32 bank on a bfloat16 base ("mixed").
    """
    found = []
    # AMD compilers get the smaller tiles
    capability = int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 0
    for name, E, L, K in (("8x8", 8, 8, 2), ("64x64", 64, 64, 8), ("4x256", 4, 256, 2)):
        found.append(_down(f"aligned-{name}", 4096, E, L, K, backward=False))
        found.append(_down(f"backward-{name}", 4096, E, L, K, backward=True))
        found.append(_up(f"aligned-{name}", 4096, E, L, K, capability, linear=False))
        found.append(_up(f"linear-{name}", 4096, E, L, K, capability, linear=True))
        found.append(_sorted(f"aligned-{name}", 4096, E, L, K, rows=128))
        found.append(_decode_down(name, 4096, E, L, K))
        found.append(_decode_up(name, 4096, E, L, K))
        # banks whose B lies in memory as [E, L, O]
        found.append(_down(f"backward-flat-{name}", 4096, E, L, K, backward=True, flat=True))
        found.append(_up(f"flat-{name}", 4096, E, L, K, capability, linear=False, flat=True))
        found.append(_up(f"linear-flat-{name}", 4096, E, L, K, capability, linear=True, flat=True))
        found.append(_sorted(f"flat-{name}", 4096, E, L, K, rows=128, flat=True))
        found.append(_decode_up(f"flat-{name}", 4096, E, L, K, flat=True))
    # banks whose dense up product has tiles of its own
    for name, E, L in (("16x16", 16, 16), ("8x32", 8, 32), ("32x8", 32, 8)):
        found.append(_up(f"wide-{name}", 4096, E, L, 2, capability, linear=False))
        found.append(_up(f"wide-flat-{name}", 4096, E, L, 2, capability, linear=False, flat=True))
    # batches that do not fill a GPU with tall tiles
    found.append(_down("few-8x8", 4096, 8, 8, 2, backward=False, tokens=2048))
    found.append(_down("backward-few-64x64", 4096, 64, 64, 8, backward=True, tokens=256))
    found.append(_up("few-8x8", 4096, 8, 8, 2, capability, linear=False, tokens=256))
    found.append(_sorted("rank-32", 4096, 64, 32, 2, rows=128))
    found.append(_sorted("rank-16", 4096, 64, 16, 2, rows=128))
    found.append(_down("odd", 1001, 3, 5, 2, backward=True))
    found.append(_up("dx-8x8", 4096, 8, 8, 2, capability, linear=True, transposed=True))
    found.append(_up("odd", 1001, 3, 5, 2, capability, linear=True))
    found.append(_sorted("rows-16", 4096, 64, 16, 2, rows=16))
    found.append(_sorted("odd", 1001, 3, 5, 2, rows=64))
    found.append(_up("flat-odd", 1001, 3, 5, 2, capability, linear=False, flat=True))
    found.append(_sorted("flat-rows-16", 4096, 64, 16, 2, rows=16, flat=True))
    found.append(_decode_up("flat-odd", 1001, 3, 5, 2, flat=True))
    limit = SHARED_LIMIT.get(arch, 65536)
    return [_cut(variant, limit) for variant in found + _wider(capability)]


def _cut(variant: Variant, limit: int) -> Variant:
    """The down product's pipeline as `tiles.tuned` cuts it to the device's shared memory."""
    if variant.kernel != "lora_down_dense":
        return variant
    sizes = variant.constants
    config = {"BM": sizes["BM"], "BK": sizes["BK"], "num_stages": variant.num_stages}
    config = fit(config, sizes["BM"], _SIZES[variant.pointers["a_ptr"]], False, limit, sizes["EB"] * sizes["LP"])
    return replace(variant, constants={**sizes, "BK": config["BK"]}, num_stages=config["num_stages"])


def _wider(capability: int) -> list[Variant]:
    """Variants with 4-byte operands, whose exact products use no matrix instruction; TF32 ones do."""
    found = []
    for name, E, L, K in (("8x16", 8, 16, 2), ("64x64", 64, 64, 8)):
        for dtype in ("fp32", "mixed"):
            more: dict[str, Any] = {"dtype": dtype}
            found.append(_down(f"{dtype}-{name}", 4096, E, L, K, backward=False, **more))
            found.append(_down(f"backward-{dtype}-{name}", 4096, E, L, K, backward=True, **more))
            found.append(_up(f"{dtype}-{name}", 4096, E, L, K, capability, linear=False, **more))
            found.append(_up(f"linear-{dtype}-{name}", 4096, E, L, K, capability, linear=True, **more))
            found.append(_sorted(f"{dtype}-{name}", 4096, E, L, K, rows=128, **more))
    more = {"dtype": "fp32"}
    found.append(_down("fp32-4x256", 4096, 4, 256, 2, backward=True, **more))
    found.append(_down("fp32-odd", 1001, 3, 5, 2, backward=True, **more))
    found.append(_up("fp32-odd", 1001, 3, 5, 2, capability, linear=True, **more))
    found.append(_sorted("fp32-odd", 1001, 3, 5, 2, rows=16, **more))
    more["precision"] = "tf32"
    found.append(_down("tf32-8x16", 4096, 8, 16, 2, backward=False, **more))
    found.append(_up("tf32-8x16", 4096, 8, 16, 2, capability, linear=True, **more))
    found.append(_sorted("tf32-8x16", 4096, 8, 16, 2, rows=128, **more))
    found.append(_decode_down("fp32-8x16", 4096, 8, 16, 2, dtype="fp32"))
    found.append(_decode_up("fp32-8x16", 4096, 8, 16, 2, dtype="fp32"))
    return found


def _down(
    name: str,
    D: int,
    E: int,
    L: int,
    K: int,
    *,
    backward: bool,
    flat: bool = False,
    tokens: int = 16384,
    dtype: str = "bf16",
    precision: str = "ieee",
) -> Variant:
    EB, LP = tiles.column_block(E, L)
    x, bank = _DTYPES[dtype]
    tile = tiles.down_tile(tokens, E, L, _SIZES[bank])
    # a B [E, O, L] seen as [E, L, O] in the backward: its ranks are next to each other, not its width
    stride_l, stride_d = (1, L) if backward and not flat else (D, 1)
    return Variant(
        kernel="lora_down_dense",
        name=name,
        function=kernels.lora_down_dense_kernel,
        pointers={
            **dict.fromkeys(("a_ptr", "h_ptr", "kept_ptr"), bank),
            "x_ptr": x,
            "ids_ptr": "*i64",
            "weights_ptr": "*fp32",
            "dw_ptr": "*fp32",
        },
        integers={
            **{"T": 16384, "D": D, "E": E, "L": L, "stride_xt": D},
            **{"stride_ae": L * D, "stride_al": stride_l, "stride_ad": stride_d},
        },
        floats=("scale",),
        constants={
            **{"K": K, "BACKWARD": backward, "EVEN_D": D % 64 == 0, "PRECISION": precision},
            **{"BM": tile["BM"], "EB": EB, "LP": LP, "BK": tile["BK"]},
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        tile_rows=_matrix_rows(tile["BM"], bank, precision),
        wide_loads=D % 16 == 0,
    )


def _matrix_rows(rows: int, operand: str, precision: str) -> int:
    """Rows of the tile, or 0 for exact float32 products, which run on the plain units."""
    return 0 if operand == "*fp32" and precision == "ieee" else rows


def _up(
    name: str,
    D: int,
    E: int,
    L: int,
    K: int,
    capability: int,
    *,
    linear: bool,
    transposed: bool = False,
    flat: bool = False,
    tokens: int = 16384,
    dtype: str = "bf16",
    precision: str = "ieee",
) -> Variant:
    x, bank = _DTYPES[dtype]
    columns = E * tiles.up_columns(E, L)[1]
    more: dict[str, Any] = {"capability": capability, "itemsize": _SIZES[bank], "columns": columns}
    tile = tiles.up_tile(tokens, D, K, linear=linear, **more)
    BC, LP = tiles.up_columns(E, L, _SIZES[bank], tile["BM"], K)
    stride_o, stride_l = (1, D) if transposed or flat else (L, 1)
    stride_wo, stride_wd = (1, D) if transposed else (D, 1)
    return Variant(
        kernel="lora_up_dense",
        name=name,
        function=kernels.lora_up_dense_kernel,
        pointers={
            **dict.fromkeys(("base_ptr", "y_ptr", "x_ptr", "w_ptr", "bias_ptr"), x),
            **dict.fromkeys(("h_ptr", "b_ptr"), bank),
            "ids_ptr": "*i64",
            "weights_ptr": "*fp32",
        },
        integers={
            **{"T": 16384, "O": D, "D": D, "E": E, "L": L, "stride_base": D, "stride_xt": D},
            **{"stride_be": L * D, "stride_bo": stride_o, "stride_bl": stride_l},
            **{"stride_wo": stride_wo, "stride_wd": stride_wd},
        },
        floats=("scale",),
        constants={
            **{"K": K, "WEIGHTS": not transposed, "BASE": not linear, "LINEAR": linear, "BIAS": False},
            **{"EVEN_D": D % 64 == 0, "PRECISION": precision, "BC": BC, "LP": LP},
            **{"BM": tile["BM"], "BN": tile["BN"], "BK": tile["BK"]},
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        # the base product of a mixed layer is one of 2-byte operands
        tile_rows=_matrix_rows(tile["BM"], x if linear else bank, precision),
        wide_loads=D % 16 == 0,
    )


def _sorted(
    name: str,
    O: int,
    E: int,
    L: int,
    K: int,
    *,
    rows: int,
    flat: bool = False,
    dtype: str = "bf16",
    precision: str = "ieee",
) -> Variant:
    stride_o, stride_l = (1, O) if flat else (L, 1)
    x, bank = _DTYPES[dtype]
    tile = tiles.sorted_tile(rows, L, _SIZES[bank])
    return Variant(
        kernel="lora_up_sorted",
        name=name,
        function=kernels.lora_up_sorted_kernel,
        pointers={
            **{"h_ptr": bank, "b_ptr": bank, "base_ptr": x, "y_ptr": x},
            **{"weights_ptr": "*fp32", "token_ptr": "*i64"},
            **_TILES,
        },
        integers={
            **{"slot": 0, "first_column": 0, "end_column": O, "O": O, "E": E, "L": L, "stride_base": O},
            **{"stride_be": L * O, "stride_bo": stride_o, "stride_bl": stride_l},
        },
        floats=("scale",),
        constants={
            **{"K": K, "FIRST": True, "WEIGHTS": True, "BASE": True, "PRECISION": precision},
            **{"BM": rows, "BN": tile["BN"], "BL": tile["BL"]},
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        tile_rows=_matrix_rows(rows, bank, precision),
        wide_loads=O % 16 == 0,
    )


def _decode_down(name: str, D: int, E: int, L: int, K: int, *, dtype: str = "bf16") -> Variant:
    x, bank = _DTYPES[dtype]
    LP, BK, _ = tiles.decode_tile(L)
    integers: dict[str, Any] = {
        "D": D,
        "E": E,
        "L": L,
        "stride_xt": D,
        "stride_ae": L * D,
        "stride_al": D,
        "stride_ad": 1,
    }
    return Variant(
        kernel="lora_decode_down",
        name=name,
        function=kernels.lora_decode_down_kernel,
        pointers={"x_ptr": x, "a_ptr": bank, "ids_ptr": "*i64", "h_ptr": "*fp32"},
        integers=integers,
        constants={"K": K, "LP": LP, "BK": BK},
        wide_loads=True,
    )


def _decode_up(name: str, O: int, E: int, L: int, K: int, *, flat: bool = False, dtype: str = "bf16") -> Variant:
    x, bank = _DTYPES[dtype]
    stride_o, stride_l = (1, O) if flat else (L, 1)
    LP, _, BN = tiles.decode_tile(L)
    integers = {"O": O, "E": E, "L": L, "stride_be": L * O, "stride_base": O}
    integers |= {"stride_bo": stride_o, "stride_bl": stride_l}
    return Variant(
        kernel="lora_decode_up",
        name=name,
        function=kernels.lora_decode_up_kernel,
        pointers={
            **{"h_ptr": "*fp32", "b_ptr": bank, "ids_ptr": "*i64"},
            **{"weights_ptr": "*fp32", "base_ptr": x, "y_ptr": x},
        },
        integers=integers,
        floats=("scale",),
        constants={"K": K, "BASE": True, "BN": BN, "LP": LP},
        # a row of B is L (O when flat) long: the JIT marks lengths as aligned only at multiples of 16
        wide_loads=(O if flat else L) % 16 == 0,
    )
