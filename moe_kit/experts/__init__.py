"""What a routing chooses: banks of experts, and mixtures of a router with a bank.

This package imports no Hugging Face code.
"""

from moe_kit.experts.bank import Bank
from moe_kit.experts.lora import LoRABank
from moe_kit.experts.mixture import Mixture
from moe_kit.experts.rank_one import RankOneBank
from moe_kit.experts.shared_a import SharedABank
from moe_kit.experts.split_head import SplitHeadBank

__all__ = ["Bank", "LoRABank", "Mixture", "RankOneBank", "SharedABank", "SplitHeadBank"]
