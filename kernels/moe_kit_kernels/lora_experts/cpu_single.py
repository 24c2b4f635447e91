"""Autograd of a form for one projection whose base was computed elsewhere.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.lora_experts.call import Call, Needs
from moe_kit_kernels.lora_experts.forms import FORMS
from moe_kit_kernels.route_plan import RoutePlan


class SingleLora(Function):
    """`apply(how, plan, scale, overwrite, x_TD, weights, base_TO, A_ELD, B_EOL)` -> [T, O]; `how` is "dense" or "native"."""

    @staticmethod
    def forward(
        ctx: Any,
        how: str,
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
        _, _, _, _, need_x, need_weights, _, need_A, need_B = ctx.needs_input_grad
        ctx.how, ctx.needs = (how, plan, scale), Needs(need_x, need_weights, (need_A,), (need_B,))
        call = Call(plan, scale, x_TD, weights, (A_ELD,), (B_EOL,))
        (y_TO,), kept = FORMS[how].add(call, (base_TO,), keep=ctx.needs.hidden, owned=overwrite)
        if overwrite and base_TO is not None:
            ctx.mark_dirty(base_TO)
        ctx.save_for_backward(x_TD, weights, A_ELD, B_EOL, *kept)
        return y_TO

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        """Compute the gradients that are asked for."""
        (how, plan, scale), (x_TD, weights, A_ELD, B_EOL, *kept) = ctx.how, ctx.saved_tensors
        call = Call(plan, scale, x_TD, weights, (A_ELD,), (B_EOL,))
        dx, dweights, (dA,), (dB,) = FORMS[how].gradients(call, ctx.needs, kept, (dy_TO,), None)
        return None, None, None, None, dx, dweights, dy_TO if ctx.needs_input_grad[6] else None, dA, dB
