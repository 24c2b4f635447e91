"""Autograd function of LoRA on every expert; `native.py`, `cpu.py` and `triton.py` offer the same four functions."""

from types import ModuleType

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.lora_grouped import cpu, native
from moe_kit_kernels.route_plan import RoutePlan


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from moe_kit_kernels.lora_grouped import triton

        return triton
    return native if backend == "native" else cpu


class LoraGrouped(torch.autograd.Function):
    """`x W_e^T + scale * (x A_e^T) B_e^T`; saves x, the stacks and the scaled H `[P, L]`."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight_EOD: Tensor,
        A_ELD: Tensor,
        B_EOL: Tensor,
        plan: RoutePlan,
        gather: bool,
        scatter: bool,
        scale: float,
        backend: str,
    ) -> Tensor:
        """Return `[P, O]` rows, sorted or in the given order."""
        run = _implementation(backend)
        h_PL = run.plain(x, A_ELD, plan, gather).mul_(scale)
        ctx.save_for_backward(x, weight_EOD, A_ELD, B_EOL, h_PL)
        ctx.plan, ctx.gather, ctx.scatter, ctx.scale, ctx.backend = plan, gather, scatter, scale, backend
        return run.product(x, weight_EOD, h_PL, B_EOL, plan, gather, scatter)

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor):
        """Return the gradients of x, weight, A and B."""
        x, weight_EOD, A_ELD, B_EOL, h_PL = ctx.saved_tensors
        plan, gather, run = ctx.plan, ctx.gather, _implementation(ctx.backend)
        need_x, need_weight, need_A, need_B = ctx.needs_input_grad[:4]
        dy_PO = dy.index_select(0, plan.order_P) if ctx.scatter else dy.contiguous()
        dx = d_weight = d_A = d_B = None
        if need_x or need_A:
            u_PL = run.plain(dy_PO, B_EOL.transpose(1, 2), plan, False).mul_(ctx.scale)
        if need_x:
            dx = run.product(dy_PO, weight_EOD.transpose(1, 2), u_PL, A_ELD.transpose(1, 2), plan, False, False)
            dx = run.combine(dx, plan) if gather else dx
        if need_weight:
            d_weight = run.gram(dy_PO, x, weight_EOD, plan, gather)
        if need_A:
            d_A = run.gram(u_PL, x, A_ELD, plan, gather)
        if need_B:
            d_B = run.gram(dy_PO, h_PL, B_EOL, plan, False)
        return dx, d_weight, d_A, d_B, None, None, None, None, None
