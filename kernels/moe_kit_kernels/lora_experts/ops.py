"""`torch.library` registration of LoRA experts, for torch.compile and export.

Eager calls go straight to the autograd functions: an operator call costs some 190 us a forward and backward at one
token. While tracing, the operator is one opaque node with known shapes: its result [T, O] and H [P, L], which the
traced backward keeps. Inside runs the same code as eager, on the Triton kernels where they serve, in the order that the
same cost model chooses from the real sizes.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_kit_kernels.common.autocast import no_autocast
from moe_kit_kernels.cost_model import CPU, LoraShape, choose_lora
from moe_kit_kernels.lora_experts import native
from moe_kit_kernels.lora_experts.autograd import Group, dense_backward, dense_forward
from moe_kit_kernels.lora_experts.call import Call, Needs
from moe_kit_kernels.lora_experts.choice import on_kernels
from moe_kit_kernels.lora_experts.cpu_sorted import sorted_backward, sorted_forward
from moe_kit_kernels.lora_experts.decision import Decision
from moe_kit_kernels.route_plan import RoutePlan, route_plan, route_plan_pairs


def _plan(ids: Tensor | None, token_P: Tensor | None, T: int, E: int) -> RoutePlan | None:
    if ids is None:
        return None
    return route_plan(ids, E) if token_P is None else route_plan_pairs(token_P, ids, T, E)


def _implementation(
    backend: str, ids: Tensor | None, x_TD: Tensor, A_ELD: Tensor, B_EOL: Tensor, weights: Tensor, y_TO: Tensor | None
) -> str:
    """The form of a call; the forward and its backward must find the same. `y_TO`: base, or the gradient of the result."""
    E, O, L = B_EOL.shape
    if ids is None or backend == "dense" or x_TD.device.type != "cpu":
        return "dense"
    tensors = (x_TD, A_ELD, B_EOL, weights, y_TO)
    if backend == "native":
        native.check("lora_experts", L, *tensors)
    if backend in ("native", "sorted"):
        return backend
    T, D = x_TD.shape
    pairs, size = weights.numel(), x_TD.element_size()
    shape = LoraShape(tokens=T, pairs=pairs, experts=E, rank=L, d_in=D, d_out=O, itemsize=size)
    return choose_lora(shape, CPU, training=True, native=native.takes(L, *tensors))


def _order(backend: str, plan: RoutePlan | None, x_TD: Tensor, B_EOL: Tensor) -> str | None:
    """Return the order of the Triton kernels, or None where plain PyTorch runs."""
    if plan is None or not on_kernels(Decision(None, x_TD, plan), x_TD):
        return None
    if backend in ("dense", "sorted"):
        return backend
    # Triton is imported by the first call that needs it
    from moe_kit_kernels.lora_experts import triton_halves

    _, O, L = B_EOL.shape
    return triton_halves.choose(plan, L, x_TD.shape[1], O, x_TD.element_size(), x_TD.device)


@torch.library.custom_op("moe_kit::lora_experts", mutates_args=())
def lora_experts_op(
    x_TD: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    ids: Tensor | None,
    token_P: Tensor | None,
    weights: Tensor,
    base_TO: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compute `lora_experts` and H, as one node of a graph.

    Args:
        x_TD: [T, D] inputs.
        A_ELD: [E, L, D] down projections.
        B_EOL: [E, O, L] up projections.
        ids: [T, K] ids, or [P] experts of free pairs, or None when every expert is chosen.
        token_P: [P] tokens of free pairs, else None.
        weights: [T, K], [P] or [T, E].
        base_TO: [T, O] or None.
        scale: factor on the sum.
        backend: "auto", "dense" or "sorted".

    Returns:
        [T, O], and H [P, L] in an order that only the backward knows.
    """
    T, (E, _, L) = x_TD.shape[0], B_EOL.shape
    plan = _plan(ids, token_P, T, E)
    how = _order(backend, plan, x_TD, B_EOL)
    with no_autocast(x_TD.device):
        if how is not None:
            from moe_kit_kernels.lora_experts import triton_halves

            (H_PL,) = triton_halves.down(how, x_TD, [A_ELD], plan)
            dtype = (x_TD if base_TO is None else base_TO).dtype
            more = {"weights": weights.float(), "scale": scale, "base_TO": base_TO}
            return triton_halves.up(how, H_PL, B_EOL, plan, dtype, **more), H_PL
        form = _implementation(backend, ids, x_TD, A_ELD, B_EOL, weights, base_TO)
        if form == "sorted":
            assert plan is not None
            return sorted_forward(plan, scale, False, x_TD, weights, base_TO, A_ELD, B_EOL)
        if form == "native":
            call = Call(plan, scale, x_TD, weights, (A_ELD,), (B_EOL,))
            (y_TO,), (H_PL,) = native.add(call, (base_TO,), keep=True, owned=False)
            return y_TO, H_PL
        group = Group(plan, scale, 1, linear=False)
        (y_TO,), (H_PL,) = dense_forward(group, x_TD, weights, (base_TO, None, A_ELD, B_EOL), keep=True)
        return y_TO, H_PL.reshape(weights.numel(), L)


@lora_experts_op.register_fake
def _(
    x_TD: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    ids: Tensor | None,
    token_P: Tensor | None,
    weights: Tensor,
    base_TO: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x_TD.dtype, A_ELD.dtype)
    out_dtype = x_TD.dtype if base_TO is None else base_TO.dtype
    y_TO = x_TD.new_empty(x_TD.shape[0], B_EOL.shape[1], dtype=out_dtype)
    return y_TO, x_TD.new_empty(weights.numel(), B_EOL.shape[2], dtype=dtype)


@torch.library.custom_op("moe_kit::lora_experts_backward", mutates_args=())
def lora_experts_backward_op(
    dy_TO: Tensor,
    x_TD: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    ids: Tensor | None,
    token_P: Tensor | None,
    weights: Tensor,
    H_PL: Tensor,
    scale: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `lora_experts`.

    Args:
        dy_TO: gradient of the result.
        x_TD: as in the forward.
        A_ELD: as in the forward.
        B_EOL: as in the forward.
        ids: as in the forward.
        token_P: as in the forward.
        weights: as in the forward.
        H_PL: the forward's second result.
        scale: as in the forward.
        backend: as in the forward.
        needs: which of x, A, B, weights want a gradient.

    Returns:
        Gradients of x, A, B, weights; an empty tensor where not wanted.
    """
    T, (E, _, L) = x_TD.shape[0], B_EOL.shape
    plan = _plan(ids, token_P, T, E)
    need_x, need_A, need_B, need_weights = needs
    how = _order(backend, plan, x_TD, B_EOL)
    if how is not None:
        from moe_kit_kernels.lora_experts import triton_halves

        wanted3 = (need_x or need_A, need_B, need_weights)
        dH, dB, dweights = triton_halves.up_backward(how, dy_TO, H_PL, B_EOL, weights.float(), plan, scale, *wanted3)
        dx = dA = None
        if dH is not None:
            dx, (dA,) = triton_halves.down_backward(how, [dH], x_TD, [A_ELD], plan, need_x, [need_A])
        dweights = None if dweights is None else dweights.to(weights.dtype)
    elif (form := _implementation(backend, ids, x_TD, A_ELD, B_EOL, weights, dy_TO)) == "native":
        which = Needs(need_x, need_weights, (need_A,), (need_B,))
        call = Call(plan, scale, x_TD, weights, (A_ELD,), (B_EOL,))
        dx, dweights, (dA,), (dB,) = native.gradients(call, which, (H_PL,), (dy_TO,), None)
    elif form == "sorted":
        assert plan is not None
        wanted = (need_x, need_weights, need_A, need_B)
        dx, dweights, dA, dB = sorted_backward(plan, scale, x_TD, weights, A_ELD, B_EOL, H_PL, dy_TO, wanted)
    else:
        group = Group(plan, scale, 1, linear=False)
        kept = (H_PL.view(T, E * L) if plan is None else H_PL,)
        wanted6 = (need_x, need_weights, False, False, need_A, need_B)
        dx, dweights, _, _, dA, dB = dense_backward(
            group, x_TD, weights, (), (A_ELD,), (B_EOL,), kept, (dy_TO,), wanted6
        )
    found = ((dx, x_TD), (dA, A_ELD), (dB, B_EOL), (dweights, weights))
    dx, dA, dB, dweights = (like.new_empty(0) if d is None else d.contiguous() for d, like in found)
    return dx, dA, dB, dweights


@lora_experts_backward_op.register_fake
def _(
    dy_TO: Tensor,
    x_TD: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    ids: Tensor | None,
    token_P: Tensor | None,
    weights: Tensor,
    H_PL: Tensor,
    scale: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dA, dB, dweights = (
        like.new_empty(like.shape if need else 0)
        for like, need in zip((x_TD, A_ELD, B_EOL, weights), needs, strict=True)
    )
    return dx, dA, dB, dweights


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x_TD, A_ELD, B_EOL, ids, token_P, weights, _, scale, backend = inputs
    ctx.save_for_backward(x_TD, A_ELD, B_EOL, ids, token_P, weights, output[1])
    ctx.scale, ctx.backend = scale, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_TO: Tensor | None, dH_PL: Tensor | None) -> tuple:
    if dy_TO is None:
        return (None,) * 9
    x_TD, A_ELD, B_EOL, ids, token_P, weights, H_PL = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [need[0], need[1], need[2], need[5]]
    grads = lora_experts_backward_op(
        dy_TO, x_TD, A_ELD, B_EOL, ids, token_P, weights, H_PL, ctx.scale, ctx.backend, needs
    )
    dx, dA, dB, dweights = (g if wanted else None for g, wanted in zip(grads, needs, strict=True))
    return dx, dA, dB, None, None, dweights, dy_TO if need[6] else None, None, None


lora_experts_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.moe_kit.lora_experts)
def lora_experts_flops(
    x_shape: tuple,
    A_shape: tuple,
    B_shape: tuple,
    ids_shape: Any,
    token_shape: Any,
    weights_shape: tuple,
    *_: Any,
    **__: Any,
) -> int:
    """Count the useful FLOPs of the forward: 2 * P * L * (D + O), whatever the implementation computes.

    Args:
        x_shape: [T, D].
        A_shape: [E, L, D].
        B_shape: [E, O, L].
        ids_shape: ignored.
        token_shape: ignored.
        weights_shape: sizes whose product is P.

    Returns:
        FLOPs.
    """
    pairs = 1
    for size in weights_shape:
        pairs *= size
    return 2 * pairs * A_shape[1] * (A_shape[2] + B_shape[1])


@register_flop_formula(torch.ops.moe_kit.lora_experts_backward)
def lora_experts_backward_flops(
    dy_shape: tuple,
    x_shape: tuple,
    A_shape: tuple,
    B_shape: tuple,
    ids_shape: Any,
    token_shape: Any,
    weights_shape: tuple,
    H_shape: tuple,
    *_: Any,
    **__: Any,
) -> int:
    """Count the useful FLOPs of the backward: twice the forward's (dH, dA, dB and dx).

    Args:
        dy_shape: [T, O].
        x_shape: [T, D].
        A_shape: [E, L, D].
        B_shape: [E, O, L].
        ids_shape: ignored.
        token_shape: ignored.
        weights_shape: ignored.
        H_shape: [P, L].

    Returns:
        FLOPs.
    """
    return 4 * H_shape[0] * A_shape[1] * (A_shape[2] + B_shape[1])
