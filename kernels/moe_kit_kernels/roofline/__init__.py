"""Roofline model of the operators: bytes and FLOPs of the kernels as written, and the time they bound.

    time = max(HBM bytes / HBM bandwidth, L2 bytes / L2 bandwidth, FLOPs / peak)

L2 bytes are what the loops load and store, counted tile by tile (a test traces the interpreter and compares). HBM bytes are
those that miss an LRU cache of the L2's size, walked in the kernels' real tile order; rows of x are single entries, so a
token that several experts read hits while it is still there. `python -m bench roofline` prints the tables.
"""

from moe_kit_kernels.roofline.designs_experts import compaction_designs, grouped_lora_designs, mlp_designs
from moe_kit_kernels.roofline.designs_lora import linear_designs, lora_designs
from moe_kit_kernels.roofline.gate import gate_backward_cost, gate_cost, gate_designs
from moe_kit_kernels.roofline.grouped import (
    combine_cost,
    gather_cost,
    gram_cost,
    product_cost,
    scatter_backward_cost,
    scatter_cost,
)
from moe_kit_kernels.roofline.lora import down_dense_cost, up_dense_cost, up_sorted_cost
from moe_kit_kernels.roofline.model import A100, H100, Cache, Cost, Device, seconds

__all__ = [
    "A100",
    "H100",
    "Cache",
    "Cost",
    "Device",
    "combine_cost",
    "compaction_designs",
    "down_dense_cost",
    "gate_backward_cost",
    "gate_cost",
    "gate_designs",
    "gather_cost",
    "gram_cost",
    "grouped_lora_designs",
    "linear_designs",
    "lora_designs",
    "mlp_designs",
    "product_cost",
    "scatter_backward_cost",
    "scatter_cost",
    "seconds",
    "up_dense_cost",
    "up_sorted_cost",
]
