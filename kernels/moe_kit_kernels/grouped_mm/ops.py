"""The grouped GEMM as a custom operator of torch, for `torch.compile` and export; eager calls do not come here.

The operator keeps no pre-activations: its backward makes them again with one more product where an activation or the
gradient of the weights reads them, which keeps every saved tensor an input. FLOPs: 2 P O D a product. Blocks of known shape compile through `experts_mlp`, which saves them.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_kit_kernels.common.autocast import no_autocast
from moe_kit_kernels.grouped_mm.autograd import GroupedMM, gradients, implementation, needs_rows
from moe_kit_kernels.grouped_mm.backend import grouped_backend
from moe_kit_kernels.route_plan import RoutePlan


def _plan(weight_EOD: Tensor, token_P: Tensor, expert_P: Tensor, num_tokens: int, slots: int) -> RoutePlan:
    return RoutePlan(expert_P, num_tokens, weight_EOD.shape[0], slots or None, None if slots else token_P)


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
    plan = _plan(weight_EOD, token_P, expert_P, num_tokens, slots)
    name = grouped_backend("grouped_mm", backend, plan.num_pairs, (weight_EOD,), x, bias_EO)
    options = plan, gather, scatter, activation or None, gated, name
    with no_autocast(x.device):
        return GroupedMM.apply(x, weight_EOD, bias_EO, weights_P, residual, *options)


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
    plan = _plan(weight_EOD, token_P, expert_P, num_tokens, slots)
    name = grouped_backend("grouped_mm", backend, plan.num_pairs, (weight_EOD,), x, bias_EO, dy)
    *needs, need_residual = needs
    z_PF = None
    with no_autocast(x.device):
        if needs_rows(activation or None, weights_P, needs[3]):
            plain = {"weights_P": None, "residual": None, "activation": None, "gated": False}
            options = {"gather": gather, "scatter": False, "bias_EO": bias_EO, "keep": True}
            _, z_PF = implementation(name).rows(x, weight_EOD, plan, **options, **plain)
        how = gather, scatter, activation or None, gated, name
        found = gradients(dy, x, weight_EOD, weights_P, z_PF, plan, *how, tuple(needs))
    # an operator's result must not alias its inputs
    last = residual.new_empty(residual.shape).copy_(dy) if need_residual else None
    return [x.new_empty(0) if g is None else g for g in (*found, last)]


@grouped_mm_backward_op.register_fake
def _(dy, x, weight_EOD, bias_EO, weights_P, residual, token_P, expert_P, T, slots, g, s, act, gated, b, needs):
    # the weight's gradient has the weight's layout, the others are contiguous
    like = [None if t is None else t.new_empty(t.shape) for t in (x, bias_EO, weights_P, residual)]
    like.insert(1, torch.empty_like(weight_EOD))
    return [t if need else x.new_empty(0) for t, need in zip(like, needs)]


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


@register_flop_formula(torch.ops.moe_kit.grouped_mm_backward)
def _backward_flops(
    dy_shape, x_shape, weight_shape, bias_shape, weights_shape, residual_shape, token_shape, *rest, **options
) -> int:
    # rest: the experts' shape, T, K, gather, scatter, activation, gated, backend, needs
    activation, needs = rest[5], rest[8]
    products = needs[0] + needs[1] + (bool(activation) or needs[3])
    return products * _forward_flops(x_shape, weight_shape, bias_shape, weights_shape, residual_shape, token_shape)
