"""The two halves of routed LoRA experts, each with its own backward, for callers that change H in between.

    down: H_p = A_e(p) x_t(p)            dA = dHd^T x,  dx = dHd A,   dHd = dH spread over [T, E*L]
    up:   y_t = base_t + scale * sum_p w_p B_e(p) H_p
          U = dy B,  dH_p = scale * w_p * U_p,  dw_p = scale * <U_p, H_p>,  dB_e = dy^T (scale * w * H)_e

The autograd functions keep the inputs and H; the arithmetic is that of `triton_halves` for tables of ids where Triton runs,
and of `plain_halves` elsewhere (the CPU, free pairs, float64, which no kernel takes).

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank.
"""

from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.lora_experts import plain_halves
from moe_kit_kernels.lora_experts.choice import on_kernels
from moe_kit_kernels.lora_experts.decision import Decision
from moe_kit_kernels.lora_experts.plain_halves import dropped_pairs
from moe_kit_kernels.route_plan import RoutePlan


def _order(backend: str, plan: RoutePlan, x: Tensor, rank: int, d_in: int, d_out: int) -> str | None:
    """Return the order of the kernels, or None where plain PyTorch runs."""
    if not on_kernels(Decision(None, x, plan), x):
        return None
    if backend == "dense":
        return "dense"
    # Triton is imported by the first call that needs it
    from moe_kit_kernels.lora_experts import triton_halves

    return triton_halves.choose(plan, rank, d_in, d_out, x.element_size(), x.device)


class LoraDown(torch.autograd.Function):
    """`apply(backend, plan, x_TD, *A)` -> tuple of [P, L]."""

    @staticmethod
    def forward(ctx: Any, backend: str, plan: RoutePlan, x_TD: Tensor, *A: Tensor) -> Any:
        """Project by every stack, x read once where that pays."""
        D = x_TD.shape[1]
        ctx.plan, ctx.how = plan, _order(backend, plan, x_TD, max(a.shape[1] for a in A), D, D)
        ctx.save_for_backward(x_TD, *A)
        if ctx.how is None:
            return tuple(plain_halves.down(x_TD, A, plan))
        from moe_kit_kernels.lora_experts import triton_halves

        return tuple(triton_halves.down(ctx.how, x_TD, A, plan))

    @staticmethod
    @first_order
    def backward(ctx: Any, *dHs: Tensor) -> Any:
        """Return the gradients of x and of every A."""
        x_TD, *A = ctx.saved_tensors
        need_x, need_A = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        if ctx.how is None:
            dx, dA = plain_halves.down_backward(dHs, x_TD, A, ctx.plan, need_x, need_A)
        else:
            from moe_kit_kernels.lora_experts import triton_halves

            dx, dA = triton_halves.down_backward(ctx.how, dHs, x_TD, A, ctx.plan, need_x, need_A)
        return None, None, dx, *dA


class LoraUp(torch.autograd.Function):
    """`apply(backend, plan, scale, H_PL, B_EOL, weights, base_TO)` -> [T, O]."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        plan: RoutePlan,
        scale: float,
        H_PL: Tensor,
        B_EOL: Tensor,
        weights: Tensor,
        base_TO: Tensor | None,
    ) -> Tensor:
        """Weigh in rank space, project, add the base."""
        _, O, L = B_EOL.shape
        ctx.plan, ctx.scale, ctx.how = plan, scale, _order(backend, plan, H_PL, L, O, O)
        ctx.save_for_backward(H_PL, B_EOL, weights)
        if ctx.how is None:
            return plain_halves.up(H_PL, B_EOL, plan, weights, scale, base_TO)
        from moe_kit_kernels.lora_experts import triton_halves

        weights_TK = weights.float().view(plan.num_tokens, plan.slots)
        dtype = (H_PL if base_TO is None else base_TO).dtype
        H_PL, B_EOL = _alike(H_PL, B_EOL)
        return triton_halves.up(ctx.how, H_PL, B_EOL, plan, dtype, weights=weights_TK, scale=scale, base_TO=base_TO)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        """Return the gradients of H, B, the weights and the base."""
        H_PL, B_EOL, weights = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        _, _, _, need_H, need_B, need_weights, need_base = ctx.needs_input_grad
        needs = (need_H, need_B, need_weights)
        if ctx.how is None:
            dH, dB, dweights = plain_halves.up_backward(dy_TO, H_PL, B_EOL, weights, plan, scale, *needs)
        else:
            from moe_kit_kernels.lora_experts import triton_halves

            weights_TK = weights.float().view(plan.num_tokens, plan.slots)
            wide_H, wide_B = _alike(H_PL, B_EOL)
            dH, dB, dw_TK = triton_halves.up_backward(ctx.how, dy_TO, wide_H, wide_B, weights_TK, plan, scale, *needs)
            dH = None if dH is None else dH.to(H_PL.dtype)
            dB = None if dB is None else dB.to(B_EOL.dtype)
            dweights = None if dw_TK is None else dw_TK.view_as(weights).to(weights.dtype)
        return None, None, None, dH, dB, dweights, dy_TO if need_base else None


def _alike(H_PL: Tensor, B_EOL: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype: the kernels multiply in the dtype of B."""
    dtype = torch.promote_types(H_PL.dtype, B_EOL.dtype)
    return H_PL.to(dtype), B_EOL.to(dtype)


def down_traced(x_TD: Tensor, A_ELD: Tensor, plan: RoutePlan) -> Tensor:
    """Down half in plain operations, for torch.compile to trace and differentiate.

    Args:
        x_TD: [T, D] inputs.
        A_ELD: [E, L, D].
        plan: the routing.

    Returns:
        [P, L] in the given order, 0 for dropped pairs.
    """
    E, L, _ = A_ELD.shape
    T = plan.num_tokens
    dtype = torch.promote_types(x_TD.dtype, A_ELD.dtype)
    H_TC = x_TD.to(dtype) @ A_ELD.flatten(0, 1).to(dtype).t()
    expert_P = plan.expert_P.clamp(max=E - 1)
    if plan.slots is not None:
        index = expert_P.view(T, plan.slots, 1).expand(T, plan.slots, L)
        H_PL = H_TC.view(T, E, L).gather(1, index).reshape(T * plan.slots, L)
    else:
        H_PL = H_TC.view(T * E, L).index_select(0, plan.token_P * E + expert_P)
    return H_PL.masked_fill(dropped_pairs(plan), 0)


def up_traced(
    H_PL: Tensor, B_EOL: Tensor, plan: RoutePlan, weights: Tensor, scale: float, base_TO: Tensor | None
) -> Tensor:
    """Up half in plain operations, for torch.compile to trace and differentiate.

    Args:
        H_PL: [P, L] in the given order.
        B_EOL: [E, O, L].
        plan: the routing.
        weights: [T, K] or [P].
        scale: factor on the sum.
        base_TO: [T, O] or None.

    Returns:
        [T, O] in the dtype of the base, else of H.
    """
    E, O, L = B_EOL.shape
    T = plan.num_tokens
    dtype = torch.promote_types(H_PL.dtype, B_EOL.dtype)
    # masked before and after: the product passes 0 * NaN on to the gradients
    dropped_P1 = dropped_pairs(plan)
    factor_P1 = (weights.reshape(-1, 1) * scale).masked_fill(dropped_P1, 0)
    G_PL = (H_PL.masked_fill(dropped_P1, 0) * factor_P1).to(dtype)
    expert_P = plan.expert_P.clamp(max=E - 1)
    if plan.slots is not None:
        index = expert_P.view(T, plan.slots, 1).expand(T, plan.slots, L)
        G_TC = G_PL.new_zeros(T, E, L).scatter_add(1, index, G_PL.view(T, plan.slots, L)).view(T, E * L)
    else:
        G_TC = G_PL.new_zeros(T * E, L).index_add(0, plan.token_P * E + expert_P, G_PL).view(T, E * L)
    y_TO = G_TC @ B_EOL.to(dtype).permute(0, 2, 1).reshape(E * L, O)
    return y_TO.to(H_PL.dtype) if base_TO is None else (base_TO + y_TO).to(base_TO.dtype)
