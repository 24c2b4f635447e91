"""`lora_linear`: a frozen linear layer and its routed LoRA experts in one function."""

from moe_kit_kernels.lora_linear.interface import lora_linear, lora_linear_group

__all__ = ["lora_linear", "lora_linear_group"]
