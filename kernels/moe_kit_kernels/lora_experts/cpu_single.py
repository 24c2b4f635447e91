"""Autograd of `cpu_columns` and of `native` for one projection whose base was computed elsewhere.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.lora_experts import cpu_columns, native
from moe_kit_kernels.lora_experts.needs import Needs
from moe_kit_kernels.route_plan import RoutePlan

_FORMS: dict[str, Any] = {"dense": cpu_columns, "native": native}


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
        ctx.call, ctx.needs = (how, plan, scale), Needs(need_x, need_weights, (need_A,), (need_B,))
        (y_TO,), kept = _FORMS[how].add(
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
        (how, plan, scale), (x_TD, weights, A_ELD, B_EOL, *kept) = ctx.call, ctx.saved_tensors
        dx, dweights, (dA,), (dB,) = _FORMS[how].gradients(
            plan, scale, ctx.needs, x_TD, weights, kept, (A_ELD,), (B_EOL,), (dy_TO,), None
        )
        return None, None, None, None, dx, dweights, dy_TO if ctx.needs_input_grad[6] else None, dA, dB
