"""Routed LoRA experts on one dense base, in the plainest PyTorch: the definition that every implementation must equal.

    y_t = base_t + scale * sum_{k: e(t,k) not dropped} w_tk * B_e(t,k) A_e(t,k) x_t

One loop over the pairs' experts; autograd gives the gradients. Nothing here is fast.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.

Source: the sum over routed low-rank experts of MoLE / MixLoRA-like methods (arXiv 2404.13628, 2404.15159).
"""

import torch
from torch import Tensor

from moe_kit_kernels.route_plan import RoutePlan


def lora_down_reference(x_TD: Tensor, A_ELD: Tensor, plan: RoutePlan) -> Tensor:
    """Project each pair's token by its expert's A.

    Args:
        x_TD: [T, D] inputs.
        A_ELD: [E, L, D] down projections; x is converted to the wider of both dtypes.
        plan: the routing.

    Returns:
        [P, L] in the plan's given order; 0 for dropped pairs.
    """
    dtype = torch.promote_types(x_TD.dtype, A_ELD.dtype)
    x_TD, A_ELD = x_TD.to(dtype), A_ELD.to(dtype)
    H_PL = x_TD.new_zeros(plan.num_pairs, A_ELD.shape[1])
    for e in range(plan.num_experts):
        chosen = (plan.expert_P == e).nonzero().squeeze(1)
        H_PL = H_PL.index_add(0, chosen, x_TD[plan.token_P[chosen]] @ A_ELD[e].T)
    return H_PL


def lora_up_reference(
    H_PL: Tensor,
    B_EOL: Tensor,
    plan: RoutePlan,
    weights: Tensor,
    *,
    scale: float = 1.0,
    base_TO: Tensor | None = None,
) -> Tensor:
    """Project each pair by its expert's B, weigh it, and add it to its token's row.

    Args:
        H_PL: [P, L] pairs in the plan's given order.
        B_EOL: [E, O, L] up projections.
        plan: the routing.
        weights: [P] or [T, K] weights.
        scale: factor on the sum.
        base_TO: [T, O] result of the frozen layer, or None for zeros.

    Returns:
        [T, O] in the dtype of the base, else of H.
    """
    out_dtype = H_PL.dtype if base_TO is None else base_TO.dtype
    dtype = torch.promote_types(H_PL.dtype, B_EOL.dtype)
    y_TO = H_PL.new_zeros(plan.num_tokens, B_EOL.shape[1], dtype=dtype)
    weights_P = weights.reshape(-1).to(dtype)
    for e in range(plan.num_experts):
        chosen = (plan.expert_P == e).nonzero().squeeze(1)
        contribution = weights_P[chosen, None] * (H_PL[chosen].to(dtype) @ B_EOL[e].to(dtype).T)
        y_TO = y_TO.index_add(0, plan.token_P[chosen], contribution)
    y_TO = scale * y_TO
    return (y_TO if base_TO is None else base_TO + y_TO).to(out_dtype)


def lora_experts_reference(
    x_TD: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    plan: RoutePlan,
    weights: Tensor,
    *,
    scale: float = 1.0,
    base_TO: Tensor | None = None,
) -> Tensor:
    """Down, weigh, up, add: see the module's equation.

    Args:
        x_TD: [T, D] inputs.
        A_ELD: [E, L, D] down projections.
        B_EOL: [E, O, L] up projections.
        plan: the routing.
        weights: [P] or [T, K] weights.
        scale: factor on the sum.
        base_TO: [T, O] result of the frozen layer, or None for zeros.

    Returns:
        [T, O] in the dtype of the base, else of x.
    """
    H_PL = lora_down_reference(x_TD, A_ELD, plan)
    y_TO = lora_up_reference(H_PL, B_EOL, plan, weights, scale=scale, base_TO=base_TO)
    return y_TO.to(x_TD.dtype) if base_TO is None else y_TO
