"""Variants of the token compaction kernels for the ahead-of-time check."""

from moe_kit_kernels.aot import Variant
from moe_kit_kernels.token_gather.triton import add_rows_backward_kernel, add_rows_kernel, gather_rows_kernel


def variants(arch: str) -> list[Variant]:
    """Return one aligned and one odd variant of each kernel.

    Args:
        arch: Architecture; the kernels are the same on all.

    Returns:
        Six variants.
    """
    found = []
    for name, D, wide in (("aligned", 4096, True), ("odd", 1001, False)):
        common = {"constants": {"BN": 1024}, "wide_loads": wide, "name": name}
        found.append(
            Variant(
                kernel="token_gather",
                function=gather_rows_kernel,
                pointers={"x_ptr": "*bf16", "index_ptr": "*i64", "out_ptr": "*bf16"},
                integers={"D": D, "stride_x": D, "stride_out": D},
                **common,
            )
        )
        pointers = {
            "base_ptr": "*bf16",
            "y_ptr": "*bf16",
            "weight_ptr": "*fp32",
            "slot_ptr": "*i64",
            "out_ptr": "*bf16",
        }
        found.append(
            Variant(
                kernel="token_scatter",
                function=add_rows_kernel,
                pointers=pointers,
                integers={"D": D, "stride_base": D, "stride_y": D},
                **{**common, "constants": {"BN": 1024, "BASE": True, "WEIGHTS": True}},
            )
        )
        pointers = {"dy_ptr": "*bf16", "y_ptr": "*bf16", "weight_ptr": "*fp32", "index_ptr": "*i64"}
        found.append(
            Variant(
                kernel="token_scatter_grad",
                function=add_rows_backward_kernel,
                pointers={**pointers, "out_ptr": "*bf16", "dot_ptr": "*fp32"},
                integers={"D": D, "stride_dy": D, "stride_y": D},
                **{**common, "constants": {"BN": 1024, "WEIGHTS": True, "DOT": True, "OUT": True}},
            )
        )
    return found
