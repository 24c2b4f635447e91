"""Autograd of `cpu_columns` for one projection whose base was computed elsewhere.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.lora_experts import cpu_columns
from moe_kit_kernels.lora_experts.needs import Needs
from moe_kit_kernels.route_plan import RoutePlan


class DenseLora(Function):
    """`apply(plan, scale, overwrite, x_TD, weights, base_TO, A_ELD, B_EOL)` -> [T, O]."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: RoutePlan | None,
        scale: float,
        overwrite: bool,
        x_TD: Tensor,
        weights: Tensor,
        base_TO: Tensor | None,
        A_ELD: Tensor,
        B_EOL: Tensor,
    ) -> Tensor:
        """Add the experts to the base."""
        _, _, _, need_x, need_weights, _, need_A, need_B = ctx.needs_input_grad
        ctx.call, ctx.needs = (plan, scale), Needs(need_x, need_weights, (need_A,), (need_B,))
        (y_TO,), kept = cpu_columns.add(
            plan, scale, x_TD, weights, (base_TO,), (A_ELD,), (B_EOL,), keep=ctx.needs.hidden, owned=overwrite
        )
        if overwrite and base_TO is not None:
            ctx.mark_dirty(base_TO)
        ctx.save_for_backward(x_TD, weights, A_ELD, B_EOL, *kept)
        return y_TO

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        """Compute the gradients that are asked for."""
        (plan, scale), (x_TD, weights, A_ELD, B_EOL, *kept) = ctx.call, ctx.saved_tensors
        dx, dweights, (dA,), (dB,) = cpu_columns.gradients(
            plan, scale, ctx.needs, x_TD, weights, kept, (A_ELD,), (B_EOL,), (dy_TO,), None
        )
        return None, None, None, dx, dweights, dy_TO if ctx.needs_input_grad[5] else None, dA, dB
