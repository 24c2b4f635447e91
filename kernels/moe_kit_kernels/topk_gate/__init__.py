"""`topk_gate`: from router logits to chosen experts, their weights and the load."""

from moe_kit_kernels.topk_gate.interface import topk_gate
from moe_kit_kernels.topk_gate.reference import TopkGate

__all__ = ["TopkGate", "topk_gate"]
