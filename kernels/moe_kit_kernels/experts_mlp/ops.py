"""The feed-forward experts as a custom operator of torch: what compile, export and FLOP counters see.

Eager calls go straight to the autograd function, which costs less; under `torch.compile` the operator stands for the whole
computation, opaque and of static shapes. FLOPs: 2 P (D F + H D) forward, twice that backward.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_kit_kernels.common.autocast import no_autocast
from moe_kit_kernels.experts_mlp.autograd import implementation
from moe_kit_kernels.experts_mlp.call import Call, Needs
from moe_kit_kernels.grouped_mm.backend import grouped_backend
from moe_kit_kernels.route_plan import RoutePlan


def _plan(x_TD: Tensor, up_EFD: Tensor, token_P: Tensor, expert_P: Tensor, slots: int) -> RoutePlan:
    free_token_P = None if slots else token_P
    return RoutePlan(expert_P, x_TD.shape[0], up_EFD.shape[0], slots or None, free_token_P)


@torch.library.custom_op("moe_kit::experts_mlp", mutates_args=())
def experts_mlp_op(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EDH: Tensor,
    weights_P: Tensor,
    token_P: Tensor,
    expert_P: Tensor,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    slots: int,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the result `[T, D]` and the pre-activations `[P, F]`; `slots` is K, or 0 for free pairs."""
    plan = _plan(x_TD, up_EFD, token_P, expert_P, slots)
    call = Call(x_TD, up_EFD, down_EDH, plan, weights_P, up_bias_EF, down_bias_ED, activation)
    name = grouped_backend(
        "experts_mlp", backend, plan.num_pairs, (up_EFD, down_EDH), x_TD, weights_P, up_bias_EF, down_bias_ED
    )
    with no_autocast(x_TD.device):
        y_TD, z_PF = implementation(name).forward(call, keep=True)
    assert z_PF is not None
    return y_TD, z_PF


@experts_mlp_op.register_fake
def _(x_TD, up_EFD, down_EDH, weights_P, token_P, expert_P, up_bias_EF, down_bias_ED, slots, activation, backend):
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(expert_P.shape[0], up_EFD.shape[1])


@torch.library.custom_op("moe_kit::experts_mlp_backward", mutates_args=())
def experts_mlp_backward_op(
    dy_TD: Tensor,
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EDH: Tensor,
    weights_P: Tensor,
    token_P: Tensor,
    expert_P: Tensor,
    down_bias_ED: Tensor | None,
    z_PF: Tensor,
    slots: int,
    activation: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Return the six gradients of `experts_mlp`; an empty tensor stands for one that is not needed."""
    plan = _plan(x_TD, up_EFD, token_P, expert_P, slots)
    # pre-activations are kept alike by all implementations
    name = grouped_backend(
        "experts_mlp", backend, plan.num_pairs, (up_EFD, down_EDH), x_TD, weights_P, down_bias_ED, dy_TD
    )
    call = Call(x_TD, up_EFD, down_EDH, plan, weights_P, None, down_bias_ED, activation)
    with no_autocast(x_TD.device):
        gradients = implementation(name).backward(call, dy_TD, z_PF, Needs(*needs))
    return [x_TD.new_empty(0) if gradient is None else gradient for gradient in gradients]


@experts_mlp_backward_op.register_fake
def _(
    dy_TD, x_TD, up_EFD, down_EDH, weights_P, token_P, expert_P, down_bias_ED, z_PF, slots, activation, backend, needs
):
    E, F, D = up_EFD.shape
    like = [
        x_TD.new_empty(x_TD.shape),
        torch.empty_like(up_EFD),
        torch.empty_like(down_EDH),
        torch.empty_like(weights_P),
        up_EFD.new_empty(E, F),
        down_EDH.new_empty(E, D),
    ]
    return [gradient if need else x_TD.new_empty(0) for gradient, need in zip(like, needs)]


def _setup_context(ctx, inputs, output):
    x_TD, up_EFD, down_EDH, weights_P, token_P, expert_P, _, down_bias_ED, slots, activation, backend = inputs
    ctx.save_for_backward(x_TD, up_EFD, down_EDH, weights_P, token_P, expert_P, down_bias_ED, output[1])
    ctx.options = slots, activation, backend


def _backward(ctx, dy_TD, _dz):
    need = ctx.needs_input_grad
    needs = [*need[:4], need[6], need[7]]
    gradients = experts_mlp_backward_op(dy_TD.contiguous(), *ctx.saved_tensors, *ctx.options, needs)
    dx, d_up, d_down, dw, d_up_bias, d_down_bias = (g if n else None for g, n in zip(gradients, needs))
    return dx, d_up, d_down, dw, None, None, d_up_bias, d_down_bias, None, None, None


experts_mlp_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.moe_kit.experts_mlp)
def _forward_flops(x_shape, up_shape, down_shape, weights_shape, *rest, out_shape=None, **options) -> int:
    _, F, D = up_shape
    return 2 * weights_shape[0] * D * (F + down_shape[2])


@register_flop_formula(torch.ops.moe_kit.experts_mlp_backward)
def _backward_flops(dy_shape, x_shape, up_shape, down_shape, weights_shape, *rest, out_shape=None, **options) -> int:
    return 2 * _forward_flops(x_shape, up_shape, down_shape, weights_shape)
