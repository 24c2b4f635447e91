"""Variants of the planning kernels for the ahead-of-time check."""

from moe_kit_kernels.aot import Variant
from moe_kit_kernels.route_plan import triton as kernels
from moe_kit_kernels.route_plan.plan import MAX_EXPERTS

_LISTS = {"expert_ptr": "*i32", "start_ptr": "*i64", "end_ptr": "*i64"}


def variants(arch: str) -> list[Variant]:
    """Return the variants of all planning kernels.

    Args:
        arch: architecture; the tiles are the same everywhere.

    Returns:
        8 and (odd) 60 experts and as many as there can be, for tables; the order of pairs also for free pairs.
    """
    found = []
    for E in (8, 60, MAX_EXPERTS):
        EP = 1 << E.bit_length()
        name, sizes = f"{E}-experts", {"BLOCK": kernels.BLOCK, "EP": EP}
        rows = max(1, kernels._SCANNED // EP)
        found += [
            Variant(
                kernel="count_pairs",
                name=name,
                function=kernels.count_pairs_kernel,
                pointers={"expert_ptr": "*i64", "count_ptr": "*i32"},
                integers={"P": 32768, "slots": 2},
                constants=sizes,
            ),
            Variant(
                kernel="scan_counts",
                name=name,
                function=kernels.scan_counts_kernel,
                pointers={"count_ptr": "*i32", "total_ptr": "*i64", "offset_ptr": "*i64"},
                integers={"num_blocks": 128, "num_experts": E},
                constants={"ROWS": rows, "EP": EP},
                num_warps=8,
            ),
            *(_place(name if table else f"{name}, free pairs", E, table, sizes) for table in (True, False)),
            Variant(
                kernel="list_tiles",
                name=name,
                function=kernels.list_tiles_kernel,
                pointers={"offset_ptr": "*i64", **_LISTS},
                integers={"P": 32768, "num_experts": E, "G": 265},
                constants={"ROWS": 128, "BLOCK": 64, "EP": EP},
            ),
        ]
    moved = {f"to_{key}": kind for key, kind in _LISTS.items()}
    order = Variant(
        kernel="order_tiles",
        name="tiles",
        function=kernels.order_tiles_kernel,
        pointers={**_LISTS, "sorted_token_ptr": "*i64", **moved},
        integers={"G": 265, "num_experts": 60, "num_tokens": 16384},
        constants={"TILES": kernels._TILES, "OTHERS": kernels._OTHERS},
    )
    return [*found, order]


def _place(name: str, E: int, table: bool, sizes: dict[str, int]) -> Variant:
    outputs = ("order_ptr", "inverse_ptr", "sorted_token_ptr", "sorted_expert_ptr")
    inputs = {"expert_ptr": "*i64", "token_ptr": "*i64", "count_ptr": "*i32", "offset_ptr": "*i64"}
    return Variant(
        kernel="place_pairs",
        name=name,
        function=kernels.place_pairs_kernel,
        pointers=inputs | dict.fromkeys(outputs, "*i64"),
        integers={"P": 32768, "slots": 2 if table else 1, "num_experts": E},
        constants={"TABLE": table, "OTHERS": kernels._COMPARED, **sizes},
    )
