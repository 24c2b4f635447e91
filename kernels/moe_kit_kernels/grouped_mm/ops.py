"""The grouped GEMM as a custom operator of torch, for `torch.compile` and export; eager calls do not come here.

The operator keeps no pre-activations: its backward makes them again with one more product, which keeps every saved tensor
an input. Blocks of known shape compile through `experts_mlp`, which saves them.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_kit_kernels.grouped_mm.autograd import GroupedMM
from moe_kit_kernels.route_plan import RoutePlan

_Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _run(inputs: _Inputs, token_P, expert_P, num_tokens, slots, gather, scatter, activation, gated, backend) -> Tensor:
    plan = RoutePlan(expert_P, num_tokens, inputs[1].shape[0], slots or None, None if slots else token_P)
    return GroupedMM.apply(*inputs, plan, gather, scatter, activation or None, gated, backend)


@torch.library.custom_op("moe_kit::grouped_mm", mutates_args=())
def grouped_mm_op(
    x: Tensor,
    weight_EOD: Tensor,
    bias_EO: Tensor | None,
    weights_P: Tensor | None,
    residual: Tensor | None,
    token_P: Tensor,
    expert_P: Tensor,
    num_tokens: int,
    slots: int,
    gather: bool,
    scatter: bool,
    activation: str,
    gated: bool,
    backend: str,
) -> Tensor:
    """Return `[P, O]`; `slots` is K, or 0 for free pairs; an empty `activation` is none."""
    inputs = x, weight_EOD, bias_EO, weights_P, residual
    return _run(inputs, token_P, expert_P, num_tokens, slots, gather, scatter, activation, gated, backend)


@grouped_mm_op.register_fake
def _(
    x, weight_EOD, bias_EO, weights_P, residual, token_P, expert_P, num_tokens, slots, gather, scatter, act, gated, b
):
    return x.new_empty(expert_P.shape[0], weight_EOD.shape[1] // (2 if gated else 1))


@torch.library.custom_op("moe_kit::grouped_mm_backward", mutates_args=())
def grouped_mm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight_EOD: Tensor,
    bias_EO: Tensor | None,
    weights_P: Tensor | None,
    residual: Tensor | None,
    token_P: Tensor,
    expert_P: Tensor,
    num_tokens: int,
    slots: int,
    gather: bool,
    scatter: bool,
    activation: str,
    gated: bool,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of the first five inputs; an empty tensor stands for one that is not needed."""
    inputs = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip((x, weight_EOD, bias_EO, weights_P, residual), needs)
    ]
    with torch.enable_grad():
        y = _run(inputs, token_P, expert_P, num_tokens, slots, gather, scatter, activation, gated, backend)
    wanted = [t for t, need in zip(inputs, needs) if need]
    found = iter(torch.autograd.grad(y, wanted, dy))
    # a gradient may be dy itself, and an operator's result must not alias its inputs
    return [next(found).clone() if need else x.new_empty(0) for need in needs]


@grouped_mm_backward_op.register_fake
def _(dy, x, weight_EOD, bias_EO, weights_P, residual, token_P, expert_P, T, slots, g, s, act, gated, b, needs):
    inputs = (x, weight_EOD, bias_EO, weights_P, residual)
    return [torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx, dy):
    needs = [bool(need) for need in ctx.needs_input_grad[:5]]
    gradients = grouped_mm_backward_op(dy.contiguous(), *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(gradients, needs)), *[None] * 9


grouped_mm_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.moe_kit.grouped_mm)
def _forward_flops(
    x_shape, weight_shape, bias_shape, weights_shape, residual_shape, token_shape, *rest, **options
) -> int:
    _, O, D = weight_shape
    return 2 * token_shape[0] * O * D
