"""Experts of one dtype and rank on pairs sorted by expert, added into results that are there: the `sorted` form.

With s the sorted pairs, t(s) their tokens and f_s = scale * weight, for each of n projections:

    forward    H = x_t(s) A_e^T,      y_t(s) += (f H) B_e^T
    backward   U = dy_t(s) B_e,       dw_s = scale * <U_s, H_s>,     dH = f U
               dB_e = (f H)_e^T dy,   dA_e = dH_e^T x,               dx_t(s) += dH A_e

Only what was chosen is computed; torch's grouped_mm walks the experts in C++. It is an alternative to `cpu_columns`,
which is faster for 8 experts of rank 8 and slower for 64 of them (measured).

Legend: T tokens, P pairs, N pairs that are not dropped, E experts, D width in, O width out, L rank, n projections.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kit_kernels.lora_experts.call import Call, Gradients, Needs, finished, started
from moe_kit_kernels.lora_experts.cpu_sorted import can_group
from moe_kit_kernels.route_plan import RoutePlan

# a gather into fresh memory of several MiB costs more in page faults than the products that read it (measured)
_CACHED_BYTES = 3 << 18


def fits(x_TD: Tensor, bases: Sequence[Tensor], A: Sequence[Tensor]) -> bool:
    """Tell whether grouped_mm takes these widths.

    Args:
        x_TD: inputs.
        bases: base weights [O_i, D].
        A: down projections [E, L, D].

    Returns:
        True when every row starts at a multiple of 16 bytes and this torch has the function.
    """
    D, L = x_TD.shape[1], A[0].shape[1]
    return all(can_group(D, w.shape[0], L, x_TD.dtype) for w in bases)


@dataclass(frozen=True, slots=True)
class Run:
    """Some neighbouring experts and their sorted pairs."""

    experts: slice
    """Which experts."""
    pairs: slice
    """Which sorted pairs."""
    ends: Tensor
    """int32 [experts of the run], end of each one's pairs within the run: grouped_mm's `offs`."""


def _runs(plan: RoutePlan, width: int, itemsize: int) -> list[Run]:
    """Cut the experts into runs whose gathered rows stay in a core's cache, and in memory that was touched before.

    Every expert is in one run, and no run is without pairs; there is none at all when every pair was dropped.
    """
    offsets = plan.host_offsets
    share = max(1, _CACHED_BYTES // (width * itemsize))
    kept = plan.__dict__.setdefault("_runs", {})
    if share not in kept:
        bounds = [0]
        for e in range(1, plan.num_experts):
            # no run without pairs: grouped_mm would be asked for an empty product
            more = offsets[e + 1] - offsets[bounds[-1]] > share
            if more and offsets[bounds[-1]] < offsets[e] < offsets[-1]:
                bounds.append(e)
        kept[share] = [
            Run(slice(a, b), slice(offsets[a], offsets[b]), plan.ends_E[a:b] - offsets[a])
            for a, b in itertools.pairwise([*bounds, plan.num_experts])
            if offsets[-1]
        ]
    return kept[share]


def _sorted(plan: RoutePlan, weights: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N] and order [N] of the sorted pairs, and their factors [N, 1]."""
    N = plan.host_offsets[-1]
    order_N, token_N = plan.order_P[:N], plan.sorted_token_P[:N]
    return token_N, order_N, weights.reshape(-1).index_select(0, order_N).mul_(scale)[:, None]


def _like_bank(like: Tensor, shape: Sequence[int], plan: RoutePlan) -> Tensor:
    """A gradient that the runs will fill; zeros where there are none."""
    return like.new_empty(shape) if plan.host_offsets[-1] else like.new_zeros(shape)


def add(
    call: Call, bases: Sequence[Tensor | None], *, keep: bool, owned: bool = True
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Add the experts to the results: see `Form.add`. H is n times [N, L], in sorted order."""
    plan, scale, x_TD, weights, A, B = call
    assert plan is not None
    grouped_mm = torch.nn.functional.grouped_mm
    token_N, _, factor_N1 = _sorted(plan, weights, scale)
    x_ND = x_TD.index_select(0, token_N)
    results, kept = [], []
    for base_TO, a_ELD, b_EOL in zip(bases, A, B, strict=True):
        y_TO = started(base_TO, x_TD, b_EOL.shape[1], owned)
        H_NL = grouped_mm(x_ND, a_ELD.transpose(1, 2), offs=plan.ends_E)
        G_NL = H_NL * factor_N1 if keep else H_NL.mul_(factor_N1)
        for run in _runs(plan, b_EOL.shape[1], x_TD.element_size()):
            rows = grouped_mm(G_NL[run.pairs], b_EOL[run.experts].transpose(1, 2), offs=run.ends)
            y_TO.index_add_(0, token_N[run.pairs], rows)
        kept.append(H_NL)
        results.append(finished(y_TO, base_TO, owned))
    return results, tuple(kept) if keep else ()


def gradients(call: Call, needs: Needs, kept: Sequence[Tensor], dys: Sequence[Tensor], dx: Tensor | None) -> Gradients:
    """Compute the gradients that are asked for: see `Form.gradients`."""
    plan, scale, x_TD, weights, A, B = call
    assert plan is not None
    dx = torch.zeros_like(x_TD) if dx is None and needs.x else dx
    grouped_mm, n = torch.nn.functional.grouped_mm, len(dys)
    token_N, order_N, factor_N1 = _sorted(plan, weights, scale)
    dw_N = dweights = None
    dA: list[Tensor | None] = [None] * n
    dB: list[Tensor | None] = [None] * n
    size = x_TD.element_size()
    for i, (dy_TO, a_ELD, b_EOL) in enumerate(zip(dys, A, B, strict=True)):
        E, O, L = b_EOL.shape
        need_U = needs.x or needs.weights or needs.A[i]
        dB[i] = _like_bank(dy_TO, (E, O, L), plan) if needs.B[i] else None
        G_NL = kept[i] * factor_N1 if needs.B[i] else None
        U_NL = dy_TO.new_empty(len(token_N), L)
        for run in _runs(plan, O, size):
            dy_NO = dy_TO.index_select(0, token_N[run.pairs])
            if needs.B[i]:
                dB[i][run.experts] = grouped_mm(dy_NO.t(), G_NL[run.pairs], offs=run.ends)
            if need_U:
                U_NL[run.pairs] = grouped_mm(dy_NO, b_EOL[run.experts], offs=run.ends)
        if not need_U:
            continue
        if needs.weights:
            part_N = (U_NL * kept[i]).sum(-1)
            dw_N = part_N if dw_N is None else dw_N.add_(part_N)
        dH_NL = U_NL.mul_(factor_N1)
        dA_ELD = _like_bank(dy_TO, a_ELD.shape, plan) if needs.A[i] else None
        for run in _runs(plan, x_TD.shape[1], size):
            if dA_ELD is not None:
                x_ND = x_TD.index_select(0, token_N[run.pairs])
                dA_ELD[run.experts] = grouped_mm(dH_NL[run.pairs].t(), x_ND, offs=run.ends)
            if dx is not None:
                rows = grouped_mm(dH_NL[run.pairs], a_ELD[run.experts], offs=run.ends)
                dx.index_add_(0, token_N[run.pairs], rows)
        dA[i] = dA_ELD
    if dw_N is not None:
        dweights = weights.new_zeros(plan.num_pairs).index_copy_(0, order_N, dw_N.mul_(scale)).view_as(weights)
    return dx, dweights, dA, dB
