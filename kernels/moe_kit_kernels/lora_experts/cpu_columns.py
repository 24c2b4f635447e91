"""Experts of one dtype and rank as columns of plain GEMMs, added into results that are there: the `dense` form.

The mathematics of `cpu` (see there for the equations) for what most calls are: float32 or float64 everywhere. At some
hundred tokens the general function's bookkeeping in Python costs as much as two GEMMs; here every line is one call.

B is joined some experts at a time, see `cpu.joined_runs`.

Legend: T tokens, P pairs, E experts, D width in, O width out, L rank, C = E*L columns of a projection, n projections.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kit_kernels.lora_experts import cpu
from moe_kit_kernels.lora_experts.call import Call, Gradients, Needs
from moe_kit_kernels.route_plan import RoutePlan


def one_dtype(first: Tensor, *others: Tensor | None) -> bool:
    """Tell whether the straight line serves some tensors.

    Args:
        first: one of them.
        *others: the others; None is skipped.

    Returns:
        True when all have one dtype, float32 or float64.
    """
    dtype = first.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return False
    # at one token a generator costs as much as a small product
    return not [tensor for tensor in others if tensor is not None and tensor.dtype is not dtype]


def _joined(A: Sequence[Tensor]) -> Tensor:
    """[n*C, D]: the A of all projections one below the other; no copy for one."""
    return A[0].flatten(0, 1) if len(A) == 1 else torch.cat(tuple(A)).flatten(0, 1)


def _parts(columns_TC: Tensor, n: int) -> Sequence[Tensor]:
    """Columns of each projection. `Tensor.split` is a function in Python, which costs as much as a small product."""
    return (columns_TC,) if n == 1 else columns_TC.chunk(n, dim=1)


def _factors(plan: RoutePlan | None, weights: Tensor, expand_EC: Tensor) -> Tensor:
    """[T, n*C] scale * weight, repeated over the rank."""
    return torch.mm(cpu.gates(plan, weights), expand_EC[:-1])


def add(
    call: Call, bases: Sequence[Tensor | None], *, keep: bool, owned: bool = True
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Add the experts to the results: see `Form.add`. H is [P * n, L], or [T, n*C] when every expert is chosen."""
    plan, scale, x_TD, weights, A, B = call
    n, (E, L, _D) = len(A), A[0].shape
    H_TC = torch.mm(x_TD, _joined(A).t())
    expand_EC = cpu.expansion(E, (L,) * n, scale, x_TD.dtype, x_TD.device)
    factors_TC = _factors(plan, weights, expand_EC)
    kept: tuple[Tensor, ...] = ()
    if keep:
        kept = (H_TC if plan is None else H_TC.view(-1, L).index_select(0, cpu.chosen_rows(plan, n)),)
    G_TC = H_TC * factors_TC if keep and plan is None else H_TC.mul_(factors_TC)
    results = []
    for part_TC, base_TO, b_EOL in zip(_parts(G_TC, n), bases, B, strict=True):
        results.append(cpu.add_up(base_TO, part_TC, b_EOL, owned=owned))
    return results, kept


def add_table(
    gates_TE: Tensor, scale: float, x_TD: Tensor, base_TO: Tensor | None, A_ELD: Tensor, B_EOL: Tensor, *, owned: bool
) -> Tensor:
    """`add` for one projection and a table of gates: as few calls as there can be, differentiable by torch itself.

    Args:
        gates_TE: [T, E] dense weights.
        scale: factor on the sum.
        x_TD: [T, D] inputs.
        base_TO: result so far [T, O]; None counts as zeros.
        A_ELD: down projections.
        B_EOL: up projections.
        owned: write over the base.

    Returns:
        [T, O].
    """
    (T, E), L, D = gates_TE.shape, *A_ELD.shape[1:]
    H_TC = torch.mm(x_TD, A_ELD.reshape(E * L, D).t())
    if H_TC.requires_grad or gates_TE.requires_grad:
        # nothing that is kept between calls may be saved for a backward
        gates_TE = gates_TE if scale == 1.0 else gates_TE * scale
        G_TC = (H_TC.view(T, E, L) * gates_TE[:, :, None]).view(T, E * L)
    else:
        expand_EC = cpu.expansion(E, (L,), scale, x_TD.dtype, x_TD.device)[:E]
        G_TC = H_TC.mul_(torch.mm(gates_TE, expand_EC))
    return cpu.add_up(base_TO, G_TC, B_EOL, owned=owned)


def gradients(call: Call, needs: Needs, kept: Sequence[Tensor], dys: Sequence[Tensor], dx: Tensor | None) -> Gradients:
    """Compute the gradients that are asked for: see `Form.gradients`."""
    plan, scale, x_TD, weights, A, B = call
    n, (T, D), (E, L, _) = len(dys), x_TD.shape, A[0].shape
    C, need_A = E * L, any(needs.A)
    expand_EC = cpu.expansion(E, (L,) * n, scale, x_TD.dtype, x_TD.device)
    factors_TC = _factors(plan, weights, expand_EC)
    dweights = None
    dA: Sequence[Tensor | None] = (None,) * n
    dB: list[Tensor | None] = [None] * n
    if needs.x or needs.weights or need_A:
        U_TC = x_TD.new_empty(T, n * C)
        for dy_TO, b_EOL, out in zip(dys, B, _parts(U_TC, n), strict=True):
            cpu.project(dy_TO, b_EOL, out)
    if kept:
        H_TC = cpu.spread_chosen(tuple(kept), plan, (L,) * n)
        if needs.weights:
            dweights = cpu.gate_gradient(U_TC, H_TC, expand_EC, plan, weights)
        if any(needs.B):
            G_TC = H_TC * factors_TC if plan is None else H_TC.mul_(factors_TC)
            for i, (dy_TO, part_TC) in enumerate(zip(dys, _parts(G_TC, n), strict=True)):
                if needs.B[i]:
                    dB[i] = cpu.up_gradient(dy_TO, part_TC, B[i])
    if needs.x or need_A:
        dH_TC = U_TC.mul_(factors_TC)
        if need_A:
            dA = torch.mm(dH_TC.t(), x_TD).view(n, E, L, D).unbind()
        if needs.x:
            A_CD = _joined(A)
            dx = torch.mm(dH_TC, A_CD) if dx is None else dx.addmm_(dH_TC, A_CD)
    return dx, dweights, dA, dB
