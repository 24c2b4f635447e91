"""A linear layer plus routed LoRA experts in the plainest PyTorch: the definition of `lora_linear`.

    y = x W^T + bias + scale * sum_k w_k B_e A_e x

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank.
"""

import torch
from torch import Tensor

from moe_kit_kernels.lora_experts.reference import lora_experts_reference
from moe_kit_kernels.route_plan import RoutePlan


def lora_linear_reference(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    A_ELD: Tensor,
    B_EOL: Tensor,
    plan: RoutePlan,
    weights: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Apply the linear layer, then add the experts one by one.

    Args:
        x_TD: [T, D] inputs.
        weight_OD: [O, D] base weight.
        bias_O: [O] base bias or None.
        A_ELD: [E, L, D] down projections.
        B_EOL: [E, O, L] up projections.
        plan: the routing.
        weights: [P] or [T, K] weights.
        scale: factor on the adapters' sum.

    Returns:
        [T, O] in the dtype of the linear layer's result.
    """
    base_TO = torch.nn.functional.linear(x_TD, weight_OD, bias_O)
    return lora_experts_reference(x_TD, A_ELD, B_EOL, plan, weights, scale=scale, base_TO=base_TO)
