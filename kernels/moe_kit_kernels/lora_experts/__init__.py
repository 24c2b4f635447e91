"""`lora_experts`: routed LoRA experts on one dense base, `base + scale * sum_k w_k B_k A_k x`, and its two halves."""

from moe_kit_kernels.lora_experts.interface import lora_down, lora_experts, lora_up

__all__ = ["lora_down", "lora_experts", "lora_up"]
