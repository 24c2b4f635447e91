"""What a routing chooses: banks of experts, and mixtures of a router with a bank.

This package imports no Hugging Face code.
"""

from moe_kit.experts.bank import Bank
from moe_kit.experts.lora import LoRABank
from moe_kit.experts.mixture import Mixture

__all__ = ["Bank", "LoRABank", "Mixture"]
