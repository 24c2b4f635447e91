"""Routed LoRA experts on pairs sorted by expert: only chosen experts are computed (the `sorted` implementation on CPU).

With o(e) = the sorted pairs of expert e, t(p) the token of pair p, and s_p = scale * w_p:

    forward    H_o = x_t(o) A_e^T               y_t(o) += (s_o H_o) B_e^T
    backward   U_o = dy_t(o) B_e                dw_p = scale * <U_p, H_p>,   dH = s U
               dB_e = dy_t(o)^T (s_o H_o)       dA_e = dH_o^T x_t(o),        dx_t(o) += dH_o A_e

Two ways to walk the experts, same results. `walk`: one expert at a time, whose rows stay in cache between the gather,
the GEMMs and the addition; for wide or many pairs. `grouped`: gather all pairs once and let torch's grouped_mm loop in
C++; for few pairs an expert, where the calls themselves cost more than the memory. Empty experts get a zero gradient.

Kept for the backward: x, H [P, L] in sorted order (shape does not depend on the routing), weights, parameters.

Legend: T tokens, P pairs, N pairs that are not dropped, E experts, D width in, O width out, L rank.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.backward import first_order
from moe_kit_kernels.route_plan import RoutePlan

# above this many bytes of gathered rows the pairs no longer stay in a core's cache between two passes (measured)
_CACHED_BYTES = 2 << 20
_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)


def _runs(plan: RoutePlan) -> list[tuple[int, int, int]]:
    """(expert, first, end) of every expert that has pairs."""
    offsets = plan.host_offsets
    return [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(offsets)) if b > a]


def can_group(D: int, O: int, L: int, dtype: torch.dtype) -> bool:
    """Tell whether torch's grouped_mm takes these widths: every row must start at a multiple of 16 bytes.

    Args:
        D: width in.
        O: width out.
        L: rank.
        dtype: dtype of the GEMMs.

    Returns:
        True when it does and this torch has it.
    """
    if _grouped_mm is None or dtype == torch.float64:
        return False
    size = torch.finfo(dtype).bits // 8
    return all(width * size % 16 == 0 for width in (D, O, L))


def _group(plan: RoutePlan, D: int, O: int, L: int, dtype: torch.dtype) -> bool:
    """Choose `grouped` or `walk`."""
    size = torch.finfo(dtype).bits // 8
    if not can_group(D, O, L, dtype):
        return False
    # with wide ranks and few pairs an expert the products outweigh the passes over memory (measured)
    few = L >= 32 and plan.num_pairs <= 64 * plan.num_experts
    return few or plan.num_pairs * max(D, O) * size <= _CACHED_BYTES


def sorted_forward(
    plan: RoutePlan,
    scale: float,
    overwrite: bool,
    x_TD: Tensor,
    weights: Tensor,
    base_TO: Tensor | None,
    A_ELD: Tensor,
    B_EOL: Tensor,
) -> tuple[Tensor, Tensor]:
    """Walk the experts: gather, down, weigh, up, add.

    Args:
        plan: the routing, on the CPU.
        scale: factor on the sum.
        overwrite: write over `base_TO`.
        x_TD: [T, D] inputs.
        weights: [T, K] or [P].
        base_TO: [T, O] or None.
        A_ELD: [E, L, D].
        B_EOL: [E, O, L].

    Returns:
        [T, O] in the dtype of the base, else of x, and H [P, L] in sorted order (zeros for dropped pairs).
    """
    _E, L, D = A_ELD.shape
    O = B_EOL.shape[1]
    dtype = torch.promote_types(x_TD.dtype, A_ELD.dtype)
    # sums over slots are kept in float32 at least
    sum_dtype = torch.promote_types(dtype, torch.float32)
    xc_TD, A_ELD_, B_EOL_ = x_TD.to(dtype), A_ELD.to(dtype), B_EOL.to(dtype)
    N = plan.host_offsets[-1]
    order_N, token_N = plan.order_P[:N], plan.sorted_token_P[:N]
    factor_N1 = _factors(weights, order_N, scale)
    H_PL = xc_TD.new_zeros(plan.num_pairs, L) if plan.num_pairs > N else xc_TD.new_empty(N, L)

    if base_TO is None:
        y_TO = xc_TD.new_zeros(plan.num_tokens, O, dtype=sum_dtype)
    elif base_TO.dtype == sum_dtype:
        y_TO = base_TO if overwrite else base_TO.clone()
    else:
        y_TO = base_TO.to(sum_dtype)

    if N and _group(plan, D, O, L, dtype):
        H_PL[:N] = _grouped_mm(xc_TD.index_select(0, token_N), A_ELD_.transpose(1, 2), offs=plan.ends_E)
        G_NL = (H_PL[:N] * factor_N1).to(dtype)
        y_NO = _grouped_mm(G_NL, B_EOL_.transpose(1, 2), offs=plan.ends_E)
        y_TO.index_add_(0, token_N, y_NO.to(sum_dtype))
    else:
        for e, a, b in _runs(plan):
            token = token_N[a:b]
            torch.mm(xc_TD.index_select(0, token), A_ELD_[e].t(), out=H_PL[a:b])
            G_NL = (H_PL[a:b] * factor_N1[a:b]).to(dtype)
            y_TO.index_add_(0, token, (G_NL @ B_EOL_[e].t()).to(sum_dtype))
    if overwrite and base_TO is not None:
        return (y_TO if y_TO is base_TO else base_TO.copy_(y_TO)), H_PL
    return y_TO.to(x_TD.dtype if base_TO is None else base_TO.dtype), H_PL


def sorted_backward(
    plan: RoutePlan,
    scale: float,
    x_TD: Tensor,
    weights: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    H_PL: Tensor,
    dy_TO: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Walk the experts once more; each gradient only if asked for.

    Args:
        plan: the routing, on the CPU.
        scale: factor on the sum.
        x_TD: [T, D] inputs.
        weights: the forward's weights.
        A_ELD: [E, L, D].
        B_EOL: [E, O, L].
        H_PL: H as `sorted_forward` gave it.
        dy_TO: gradient of the result.
        needs: which of x, weights, A, B want a gradient.

    Returns:
        Gradients of x, weights, A, B; None where not wanted.
    """
    need_x, need_weights, need_A, need_B = needs
    E, L, D = A_ELD.shape
    O = B_EOL.shape[1]
    dtype = H_PL.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    dyc_TO, xc_TD, A_ELD_, B_EOL_ = dy_TO.to(dtype), x_TD.to(dtype), A_ELD.to(dtype), B_EOL.to(dtype)
    N = plan.host_offsets[-1]
    order_N, token_N = plan.order_P[:N], plan.sorted_token_P[:N]
    factor_N1 = _factors(weights, order_N, scale)
    need_U = need_x or need_weights or need_A

    U_NL = x_TD.new_empty(N, L, dtype=dtype)
    dx_TD = x_TD.new_zeros(x_TD.shape, dtype=sum_dtype) if need_x else None
    dA = dB = None
    if N and _group(plan, D, O, L, dtype):
        dy_NO = dyc_TO.index_select(0, token_N)
        if need_U:
            U_NL = _grouped_mm(dy_NO, B_EOL_, offs=plan.ends_E)
            dH_NL = (U_NL * factor_N1).to(dtype)
        if need_B:
            dB = _grouped_mm(dy_NO.t(), (H_PL[:N] * factor_N1).to(dtype), offs=plan.ends_E)
        if need_A:
            dA = _grouped_mm(dH_NL.t(), xc_TD.index_select(0, token_N), offs=plan.ends_E)
        if dx_TD is not None:
            dx_NO = _grouped_mm(dH_NL, A_ELD_, offs=plan.ends_E)
            dx_TD.index_add_(0, token_N, dx_NO.to(sum_dtype))
    else:
        runs = _runs(plan)
        new = torch.empty if len(runs) == E else torch.zeros
        dA = new(A_ELD.shape, dtype=dtype) if need_A else None
        dB = new(B_EOL.shape, dtype=dtype) if need_B else None
        for e, a, b in runs:
            token = token_N[a:b]
            dy = dyc_TO.index_select(0, token)
            if dB is not None:
                torch.mm(dy.t(), (H_PL[a:b] * factor_N1[a:b]).to(dtype), out=dB[e])
            if need_U:
                torch.mm(dy, B_EOL_[e], out=U_NL[a:b])
                dH = (U_NL[a:b] * factor_N1[a:b]).to(dtype)
            if dA is not None:
                torch.mm(dH.t(), xc_TD.index_select(0, token), out=dA[e])
            if dx_TD is not None:
                dx_TD.index_add_(0, token, (dH @ A_ELD_[e]).to(sum_dtype))

    dweights = None
    if need_weights:
        dw_N = (U_NL.to(factor_N1.dtype) * H_PL[:N]).sum(-1).mul_(scale)
        dweights = weights.new_zeros(plan.num_pairs).index_copy_(0, order_N, dw_N.to(weights.dtype)).view_as(weights)
    return (
        dx_TD if dx_TD is None else dx_TD.to(x_TD.dtype),
        dweights,
        dA if dA is None else dA.to(A_ELD.dtype),
        dB if dB is None else dB.to(B_EOL.dtype),
    )


class SortedLora(torch.autograd.Function):
    """`apply(plan, scale, overwrite, x_TD, weights, base_TO, A_ELD, B_EOL)` -> [T, O]."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: RoutePlan,
        scale: float,
        overwrite: bool,
        x_TD: Tensor,
        weights: Tensor,
        base_TO: Tensor | None,
        A_ELD: Tensor,
        B_EOL: Tensor,
    ) -> Tensor:
        """Compute the result; keep H."""
        y_TO, H_PL = sorted_forward(plan, scale, overwrite, x_TD, weights, base_TO, A_ELD, B_EOL)
        if overwrite and base_TO is not None:
            ctx.mark_dirty(base_TO)
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(x_TD, weights, A_ELD, B_EOL, H_PL)
        return y_TO

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        """Compute the gradients that are asked for."""
        x_TD, weights, A_ELD, B_EOL, H_PL = ctx.saved_tensors
        _, _, _, need_x, need_weights, need_base, need_A, need_B = ctx.needs_input_grad
        needs = (need_x, need_weights, need_A, need_B)
        dx, dweights, dA, dB = sorted_backward(ctx.plan, ctx.scale, x_TD, weights, A_ELD, B_EOL, H_PL, dy_TO, needs)
        return None, None, None, dx, dweights, dy_TO if need_base else None, dA, dB


def _factors(weights: Tensor, order_N: Tensor, scale: float) -> Tensor:
    """[N, 1] scale * weight of each sorted pair, float32 at least."""
    factors = weights.reshape(-1).index_select(0, order_N)
    return factors.to(torch.promote_types(weights.dtype, torch.float32)).mul(scale)[:, None]
