"""Routed LoRA experts as a few plain GEMMs, forward and backward by hand (the `dense` implementation).

All experts' A are one matrix [E*L, D] and all B one matrix [O, E*L]; the routing is a mask in rank space. With
G = [T, E] the dense gates and X = [E, E*L] ones on the block diagonal (times `scale`):

    Hd = x A^T              [T, E*L]   every expert's hidden
    M  = G X                [T, E*L]   scale * weight, repeated over the rank
    y  = base + (Hd * M) B^T

    U  = dy B               dw = rowsum of U * Hd per expert     (gate gradient in rank space, never O wide)
    dH = U * M              dA = dH^T x,   dB = dy^T (Hd * M),   dx = dy W + dH A

Expansion by a tiny GEMM with X costs a fifth of a broadcast multiply over rows of L = 8 numbers. Weights of dropped pairs
are summed in a column of their own that G leaves out, and the gates' gradient has a zero column for them: empty slots need
no masking anywhere. Kept for the backward is only H of the
chosen experts [P, L], gathered before it is weighed; the backward scatters it back (repeated ids write equal values).

Several projections that read one x (q, k, v) share the GEMMs of A: columns are projection-major, then expert, then rank.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank, C = all columns = sum of E*L over projections.

It is not sparse in compute: E/K times the FLOPs of the chosen experts; `cpu_sorted.py` is.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moe_kit_kernels.route_plan import RoutePlan


@lru_cache(maxsize=256)
def expansion(
    num_experts: int, ranks: tuple[int, ...], scale: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Build X: the matrix that repeats gates over the rank columns of every projection.

    Args:
        num_experts: E.
        ranks: L of each projection.
        scale: value of the non-zero entries.
        dtype: dtype of the gates.
        device: where the gates live.

    Returns:
        [E + 1, C]; the last row, of dropped pairs, is zero. Cached: do not write to it.
    """
    # kept between calls: an inference tensor could never meet a gradient
    with torch.inference_mode(False):
        blocks = [
            torch.eye(num_experts + 1, num_experts, dtype=dtype, device=device)
            .mul_(scale)
            .repeat_interleave(rank, dim=1)
            for rank in ranks
        ]
        return torch.cat(blocks, dim=1)


def gates(plan: RoutePlan | None, weights: Tensor) -> Tensor:
    """Put the weights of the pairs in a dense table.

    Args:
        plan: the routing; None when `weights` is already [T, E].
        weights: [P], [T, K], or [T, E] without a plan.

    Returns:
        [T, E]. The weights of dropped pairs are not in it: they may be anything, NaN too.
    """
    if plan is None:
        return weights
    return plan.dense_TE(weights)


def chosen_rows(plan: RoutePlan, projections: int) -> Tensor:
    """Rows of the chosen experts in a [T * projections * E, L] view of the columns.

    Args:
        plan: the routing. Dropped pairs point at the last expert of their token, where reading is harmless.
        projections: number of projections that share x and have one rank.

    Returns:
        [P * projections] int64; computed once a plan and number.
    """
    kept = plan.__dict__.setdefault("_chosen_rows", {})
    if projections not in kept:
        E = plan.num_experts
        # the last row of a token's first projection stands in for dropped pairs
        expert_P = plan.expert_P.clamp(max=E - 1)
        if plan.slots is not None:
            first_P = (
                expert_P.view(plan.num_tokens, plan.slots) + _row_starts(plan.num_tokens, projections * E, plan.device)
            ).view(-1)
        else:
            first_P = plan.token_P * (projections * E) + expert_P
        if projections > 1:
            first_P = (first_P[:, None] + torch.arange(projections, device=first_P.device) * E).reshape(-1)
        kept[projections] = first_P
    return kept[projections]


@lru_cache(maxsize=64)
def _row_starts(T: int, step: int, device: torch.device) -> Tensor:
    """[T, 1] first row of each token; cached, not to be written."""
    return torch.arange(0, T * step, step, device=device)[:, None]


def keep_chosen(columns_TC: Tensor, plan: RoutePlan | None, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Gather the chosen experts' columns: what the backward needs of H.

    Args:
        columns_TC: [T, C] every expert's hidden.
        plan: the routing; None keeps all columns (every expert is chosen).
        ranks: L of each projection.

    Returns:
        One [P * projections, L] tensor when the ranks are equal, else one [P, L] a projection.
    """
    if plan is None:
        return (columns_TC,)
    if len(set(ranks)) == 1:
        rows = columns_TC.view(-1, ranks[0])
        return (rows.index_select(0, chosen_rows(plan, len(ranks))),)
    parts = columns_TC.split([plan.num_experts * rank for rank in ranks], dim=1)
    return tuple(
        part.reshape(-1, rank).index_select(0, chosen_rows(plan, 1)) for part, rank in zip(parts, ranks, strict=True)
    )


def spread_chosen(kept: tuple[Tensor, ...], plan: RoutePlan | None, ranks: tuple[int, ...]) -> Tensor:
    """Undo `keep_chosen`; columns of experts that were not chosen are 0.

    Args:
        kept: the result of `keep_chosen`.
        plan: the routing.
        ranks: L of each projection.

    Returns:
        [T, C], freshly allocated when there is a plan.
    """
    if plan is None:
        return kept[0]
    T, E = plan.num_tokens, plan.num_experts
    if len(kept) == 1:
        rows = kept[0].new_zeros(T * len(ranks) * E, ranks[0])
        return rows.index_copy_(0, chosen_rows(plan, len(ranks)), kept[0]).view(T, E * sum(ranks))
    parts = []
    for part, rank in zip(kept, ranks, strict=True):
        rows = part.new_zeros(T * E, rank)
        parts.append(rows.index_copy_(0, chosen_rows(plan, 1), part).view(T, E * rank))
    return torch.cat(parts, dim=1)


def join_down(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Stack the A of all projections; no copy for a single contiguous one.

    Args:
        A: [E, L, D] stacks.
        dtype: dtype to compute in.

    Returns:
        [C, D].
    """
    if len(A) == 1:
        return A[0].flatten(0, 1).to(dtype)
    return torch.cat([a.flatten(0, 1).to(dtype) for a in A])


def is_joined(B_EOL: Tensor) -> bool:
    """Return True if B lies as [E, L, O]: the experts' B lie one behind the other, and joining them copies nothing.

    Args:
        B_EOL: [E, O, L].
    """
    _, O, L = B_EOL.shape
    return B_EOL.stride() == (L * O, 1, O)


def joined_runs(B_EOL: Tensor, dtype: torch.dtype, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the experts' B side by side, for products over all experts.

    Products of few columns are slow, so neighbouring experts are copied together: as many as make the copy no larger than the result
    [T, O] of a product. Nothing of the bank's size is ever allocated. Where `is_joined`, all experts come as one view.

    Args:
        B_EOL: [E, O, L].
        dtype: dtype to compute in.
        tokens: T.

    Yields:
        Columns (the numbers e * L + l of the run's experts), and their matrix [O, columns].
    """
    E, O, L = B_EOL.shape
    if B_EOL.dtype is dtype and is_joined(B_EOL):
        yield slice(0, E * L), B_EOL.as_strided((O, E * L), (1, O))
        return
    count = max(1, tokens // max(1, L))
    for e in range(0, E, count):
        run = B_EOL[e : e + count].to(dtype)
        # a view of one expert
        yield slice(e * L, (e + len(run)) * L), run.transpose(0, 1).reshape(O, -1)


def is_one_run(B_EOL: Tensor, tokens: int) -> bool:
    """Return True if `joined_runs` gives all experts at once.

    Args:
        B_EOL: [E, O, L].
        tokens: T.
    """
    E, _, L = B_EOL.shape
    return is_joined(B_EOL) or tokens >= E * L


def add_up(y_TO: Tensor | None, G_TC: Tensor, B_EOL: Tensor, *, owned: bool) -> Tensor:
    """Add `sum_e G_e B_e^T`.

    Args:
        y_TO: [T, O] in the dtype of G; None counts as zeros.
        G_TC: [T, E*L].
        B_EOL: [E, O, L].
        owned: write over y.

    Returns:
        [T, O].
    """
    for columns, B_OC in joined_runs(B_EOL, G_TC.dtype, len(G_TC)):
        part_TC = G_TC[:, columns]
        if y_TO is None:
            y_TO = torch.mm(part_TC, B_OC.t())
        else:
            y_TO = y_TO.addmm_(part_TC, B_OC.t()) if owned else torch.addmm(y_TO, part_TC, B_OC.t())
        # a fresh result, which no gradient reads
        owned = True
    assert y_TO is not None
    return y_TO


def project(dy_TO: Tensor, B_EOL: Tensor, out_TC: Tensor | None = None) -> Tensor:
    """Compute `U_e = dy B_e` of all experts.

    Args:
        dy_TO: [T, O].
        B_EOL: [E, O, L].
        out_TC: [T, E*L] to write to; None allocates it.

    Returns:
        [T, E*L].
    """
    T, (E, _, L) = len(dy_TO), B_EOL.shape
    out_TC = dy_TO.new_empty(T, E * L) if out_TC is None else out_TC
    for columns, B_OC in joined_runs(B_EOL, dy_TO.dtype, T):
        torch.mm(dy_TO, B_OC, out=out_TC[:, columns])
    return out_TC


def up_gradient(dy_TO: Tensor, G_TC: Tensor, B_EOL: Tensor) -> Tensor:
    """Compute the gradient of B, `dy^T G_e` of all experts.

    Args:
        dy_TO: [T, O].
        G_TC: [T, E*L], in the dtype of dy.
        B_EOL: [E, O, L]; the result lies like it.

    Returns:
        [E, O, L] in the dtype of B.
    """
    (E, O, L), T = B_EOL.shape, len(dy_TO)
    if is_joined(B_EOL):
        return torch.mm(G_TC.t(), dy_TO).view(E, L, O).transpose(1, 2).to(B_EOL.dtype)
    dB_EOL, count = torch.empty_like(B_EOL), max(1, T // max(1, L))
    for e in range(0, E, count):
        run = dB_EOL[e : e + count]
        run.copy_(torch.mm(G_TC[:, e * L : (e + len(run)) * L].t(), dy_TO).view(-1, L, O).transpose(1, 2))
    return dB_EOL


def weigh(columns_TC: Tensor, gates_TE: Tensor, expand_EC: Tensor) -> Tensor:
    """Multiply columns by scale * weight, in place when the dtype is that of the gates.

    Args:
        columns_TC: [T, C]; overwritten when it has the gates' dtype.
        gates_TE: the table of `gates`.
        expand_EC: the matrix of `expansion`.

    Returns:
        [T, C] in the columns' dtype; the product is taken in the gates' dtype.
    """
    factors_TC = gates_TE @ expand_EC[: gates_TE.shape[1]]
    if columns_TC.dtype == factors_TC.dtype:
        return columns_TC.mul_(factors_TC)
    return factors_TC.mul_(columns_TC).to(columns_TC.dtype)


def gate_gradient(U_TC: Tensor, H_TC: Tensor, expand_EC: Tensor, plan: RoutePlan | None, weights: Tensor) -> Tensor:
    """Gradient of the weights: per pair, scale * <B^T dy, A x>.

    Args:
        U_TC: [T, C] dy B.
        H_TC: [T, C] x A^T, at least where chosen.
        expand_EC: the matrix of `expansion`; its zero row gives dropped pairs a zero gradient.
        plan: the routing; None when every expert is chosen.
        weights: the forward's weights, for shape.

    Returns:
        Gradient in the shape and dtype of `weights`.
    """
    product_TC = torch.mul(U_TC, H_TC) if U_TC.dtype == expand_EC.dtype else U_TC.to(expand_EC.dtype).mul_(H_TC)
    if plan is None:
        return product_TC @ expand_EC[:-1].t()
    table_TE1 = product_TC @ expand_EC.t()
    if plan.slots is not None:
        return table_TE1.gather(1, plan.expert_P.view(plan.num_tokens, plan.slots)).view_as(weights)
    return table_TE1.view(-1).index_select(0, plan.gate_index_P).view_as(weights)
