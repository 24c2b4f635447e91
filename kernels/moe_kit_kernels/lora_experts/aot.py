"""Variants of the LoRA kernels for the ahead-of-time check: model widths at usual ranks, and odd widths and ranks."""

from typing import Any

from moe_kit_kernels.aot import Variant
from moe_kit_kernels.lora_experts import tiles
from moe_kit_kernels.lora_experts import triton as kernels

_TILES = {"tile_expert_ptr": "*i32", "tile_start_ptr": "*i64", "tile_end_ptr": "*i64"}


def variants(arch: str) -> list[Variant]:
    """Return the variants of the five kernels.

    Args:
        arch: architecture; the tile of the base product depends on it.

    Returns:
        Aligned variants (4096 wide, bfloat16) at ranks 8 to 256, also with B in memory as [E, L, O] ("flat"), and odd ones
        (1001 wide, rank 5).
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
    return found


def _down(
    name: str, D: int, E: int, L: int, K: int, *, backward: bool, flat: bool = False, tokens: int = 16384
) -> Variant:
    EB, LP = tiles.column_block(E, L)
    tile = tiles.down_tile(tokens, E, L)
    # a B [E, O, L] seen as [E, L, O] in the backward: its ranks are next to each other, not its width
    stride_l, stride_d = (1, L) if backward and not flat else (D, 1)
    return Variant(
        kernel="lora_down_dense",
        name=name,
        function=kernels.lora_down_dense_kernel,
        pointers={
            **dict.fromkeys(("x_ptr", "a_ptr", "h_ptr", "kept_ptr"), "*bf16"),
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
            **{"K": K, "BACKWARD": backward, "EVEN_D": D % 64 == 0, "PRECISION": "ieee"},
            **{"BM": tile["BM"], "EB": EB, "LP": LP, "BK": tile["BK"]},
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        tile_rows=tile["BM"],
        wide_loads=D % 16 == 0,
    )


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
) -> Variant:
    BC, LP = tiles.up_columns(E, L)
    tile = tiles.up_tile(tokens, D, K, linear=linear, capability=capability)
    stride_o, stride_l = (1, D) if transposed or flat else (L, 1)
    stride_wo, stride_wd = (1, D) if transposed else (D, 1)
    return Variant(
        kernel="lora_up_dense",
        name=name,
        function=kernels.lora_up_dense_kernel,
        pointers={
            **dict.fromkeys(("h_ptr", "b_ptr", "base_ptr", "y_ptr", "x_ptr", "w_ptr", "bias_ptr"), "*bf16"),
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
            **{"EVEN_D": D % 64 == 0, "PRECISION": "ieee", "BC": BC, "LP": LP},
            **{"BM": tile["BM"], "BN": tile["BN"], "BK": tile["BK"]},
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        tile_rows=tile["BM"],
        wide_loads=D % 16 == 0,
    )


def _sorted(name: str, O: int, E: int, L: int, K: int, *, rows: int, flat: bool = False) -> Variant:
    stride_o, stride_l = (1, O) if flat else (L, 1)
    tile = tiles.sorted_tile(rows, L)
    return Variant(
        kernel="lora_up_sorted",
        name=name,
        function=kernels.lora_up_sorted_kernel,
        pointers={
            **dict.fromkeys(("h_ptr", "b_ptr", "base_ptr", "y_ptr"), "*bf16"),
            **{"weights_ptr": "*fp32", "token_ptr": "*i64"},
            **_TILES,
        },
        integers={
            **{"slot": 0, "first_column": 0, "end_column": O, "O": O, "E": E, "L": L, "stride_base": O},
            **{"stride_be": L * O, "stride_bo": stride_o, "stride_bl": stride_l},
        },
        floats=("scale",),
        constants={
            **{"K": K, "FIRST": True, "WEIGHTS": True, "BASE": True, "PRECISION": "ieee"},
            **{"BM": rows, "BN": tile["BN"], "BL": tile["BL"]},
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        tile_rows=rows,
        wide_loads=O % 16 == 0,
    )


def _decode_down(name: str, D: int, E: int, L: int, K: int) -> Variant:
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
        pointers={"x_ptr": "*bf16", "a_ptr": "*bf16", "ids_ptr": "*i64", "h_ptr": "*fp32"},
        integers=integers,
        constants={"K": K, "LP": LP, "BK": BK},
        wide_loads=True,
    )


def _decode_up(name: str, O: int, E: int, L: int, K: int, *, flat: bool = False) -> Variant:
    stride_o, stride_l = (1, O) if flat else (L, 1)
    LP, _, BN = tiles.decode_tile(L)
    integers = {"O": O, "E": E, "L": L, "stride_be": L * O, "stride_base": O}
    integers |= {"stride_bo": stride_o, "stride_bl": stride_l}
    return Variant(
        kernel="lora_decode_up",
        name=name,
        function=kernels.lora_decode_up_kernel,
        pointers={
            **{"h_ptr": "*fp32", "b_ptr": "*bf16", "ids_ptr": "*i64"},
            **{"weights_ptr": "*fp32", "base_ptr": "*bf16", "y_ptr": "*bf16"},
        },
        integers=integers,
        floats=("scale",),
        constants={"K": K, "BASE": True, "BN": BN, "LP": LP},
        # a row of B is L (O when flat) long: the JIT marks lengths as aligned only at multiples of 16
        wide_loads=(O if flat else L) % 16 == 0,
    )
