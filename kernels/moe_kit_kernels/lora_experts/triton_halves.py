"""The down and up products of LoRA experts on the Triton kernels, forward and backward, each on its own.

    down   H_p = A_e(p) x_t(p)                              dA_e = dH_e^T x,   dx_t = sum_p dH_p A_e(p)
    up     y_t = base_t + scale * sum_p w_p B_e(p) H_p      dH_p, dw_p in one pass over dy,   dB_e = dy^T (scale w H)_e

`dense` goes token by token, `sorted` expert by expert, `mixed` is sorted down and dense up; weight gradients always go by expert and write every expert. Routings
are tables [T, K]. Nothing here is an autograd function: `halves` and `triton_autograd` wrap it.

Legend: T tokens, K slots a token, P = T*K pairs, E experts, D width in, O width out, L rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kit_kernels.cost_model import LoraShape, choose_lora, device_of
from moe_kit_kernels.grouped_mm.launch import plan_tiles, product
from moe_kit_kernels.grouped_mm.launch_sums import gram
from moe_kit_kernels.lora_experts import launch
from moe_kit_kernels.lora_experts.tiles import by_token, down_rows
from moe_kit_kernels.route_plan import RoutePlan

# widest sum of ranks that one launch of the dense down kernel keeps in registers
_JOINED_RANKS = 128


def choose(plan: RoutePlan, rank: int, d_in: int, d_out: int, itemsize: int, device: torch.device) -> str:
    """Ask the cost model for an order.

    Args:
        plan: The routing.
        rank: L.
        d_in: Width of the input.
        d_out: Width of the result.
        itemsize: Bytes an element.
        device: Where it will run.

    Returns:
        "dense", "mixed" or "sorted".
    """
    shape = LoraShape(
        tokens=plan.num_tokens,
        pairs=plan.num_pairs,
        experts=plan.num_experts,
        rank=rank,
        d_in=d_in,
        d_out=d_out,
        itemsize=itemsize,
    )
    return choose_lora(shape, device_of(device), training=True)


def _sorted_down(x_TD: Tensor, A_ELD: Tensor, plan: RoutePlan) -> Tensor:
    """[P, L] in the given order, by segments of the sorted order."""
    (E, L, D), dtype = A_ELD.shape, torch.promote_types(x_TD.dtype, A_ELD.dtype)
    rows = down_rows(plan.num_pairs, E, L, dtype.itemsize)
    tiles = plan_tiles(plan, by_token=by_token(E, L, D, dtype.itemsize), rows=rows)
    # rows of dropped pairs are written as zeros
    return product(x_TD.to(dtype), A_ELD.to(dtype), plan, tiles, gather=True, scatter=True)[0]


def _one_down(how: str, x_TD: Tensor, A_ELD: Tensor, plan: RoutePlan) -> Tensor:
    return launch.down_dense(x_TD, A_ELD, plan)[0] if how == "dense" else _sorted_down(x_TD, A_ELD, plan)


def joins(A: Sequence[Tensor], num_tokens: int) -> bool:
    """Tell whether several stacks should be copied into one, so that x is read once.

    Args:
        A: Stacks [E, L_i, D].
        num_tokens: T.

    Returns:
        True where the copy moves less than the reads of x that it saves, and one accumulator holds all ranks.
    """
    ranks = sum(a.shape[1] for a in A)
    same = len({a.dtype for a in A}) == 1
    return len(A) > 1 and same and ranks <= _JOINED_RANKS and 2 * A[0].shape[0] * ranks <= (len(A) - 1) * num_tokens


def down(how: str, x_TD: Tensor, A: Sequence[Tensor], plan: RoutePlan) -> list[Tensor]:
    """Project every pair's token by its expert's A.

    Args:
        how: "dense", "mixed" or "sorted".
        x_TD: [T, D].
        A: Stacks [E, L_i, D].
        plan: The routing, from a table.

    Returns:
        [P, L_i] in the given order, 0 for dropped pairs, one a stack.
    """
    if joins(A, plan.num_tokens):
        H_PL = _one_down(how, x_TD, torch.cat(list(A), dim=1), plan)
        return [part.contiguous() for part in H_PL.split([a.shape[1] for a in A], dim=1)]
    return [_one_down(how, x_TD, a, plan) for a in A]


def down_backward(
    how: str,
    dHs: Sequence[Tensor],
    x_TD: Tensor,
    A: Sequence[Tensor],
    plan: RoutePlan,
    need_x: bool,
    need_A: Sequence[bool],
    *,
    linear: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of `down`.

    Args:
        how: As in the forward.
        dHs: [P, L_i]; those of dropped pairs are not read.
        x_TD: As in the forward.
        A: As in the forward.
        plan: As in the forward.
        need_x: Whether dx is wanted.
        need_A: Which dA are wanted.
        linear: (dy [T, O], W [O, D]): `dy W` is added to dx inside the same kernel. One stack only.

    Returns:
        dx [T, D] and one dA [E, L_i, D] a stack; None where not wanted.
    """
    dA: list[Tensor | None] = [None] * len(A)
    if any(need_A):
        for i, (dH_PL, a) in enumerate(zip(dHs, A, strict=True)):
            if need_A[i]:
                dA[i] = gram(dH_PL.index_select(0, plan.order_P), x_TD.to(dH_PL.dtype), a, plan, gather_x=True)[0]
    dx = None
    if need_x:
        if linear is not None:
            more = {"linear": (linear[0], linear[1].t(), None)}
            dx = launch.up_dense(dHs[0], A[0].transpose(1, 2), plan, x_TD.dtype, **more)
        elif joins(A, plan.num_tokens):
            dx = up(how, torch.cat(list(dHs), dim=1), torch.cat(list(A), dim=1).transpose(1, 2), plan, x_TD.dtype)
        else:
            # each stack adds to the sum of those before it
            for dH_PL, a in zip(dHs, A, strict=True):
                dx = up(how, dH_PL, a.transpose(1, 2), plan, x_TD.dtype, base_TO=dx)
    return dx, dA


def up(
    how: str,
    H_PL: Tensor,
    B_EOL: Tensor,
    plan: RoutePlan,
    dtype: torch.dtype,
    *,
    weights: Tensor | None = None,
    scale: float = 1.0,
    base_TO: Tensor | None = None,
) -> Tensor:
    """Project every pair by its expert's B and add it to its token's row.

    Args:
        how: "dense", "mixed" or "sorted".
        H_PL: [P, L] in the given order.
        B_EOL: [E, O, L], any strides.
        plan: The routing, from a table.
        dtype: Of the result.
        weights: [T, K] float32, or None when H is weighed already.
        scale: Factor that goes with the weights.
        base_TO: Added.

    Returns:
        [T, O].
    """
    run = launch.up_sorted if how == "sorted" else launch.up_dense
    return run(H_PL, B_EOL, plan, dtype, weights=weights, scale=scale, base_TO=base_TO)


def up_backward(
    how: str,
    dy_TO: Tensor,
    H_PL: Tensor,
    B_EOL: Tensor,
    weights_TK: Tensor,
    plan: RoutePlan,
    scale: float,
    need_H: bool,
    need_B: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `up`.

    Args:
        how: As in the forward.
        dy_TO: [T, O].
        H_PL: As in the forward.
        B_EOL: As in the forward.
        weights_TK: [T, K] float32.
        plan: As in the forward.
        scale: As in the forward.
        need_H: Whether dH is wanted.
        need_B: Whether dB is wanted.
        need_weights: Whether the gates' gradient is wanted.

    Returns:
        dH [P, L] (0 for dropped pairs), dB [E, O, L], dw [T, K] float32; None where not wanted.
    """
    dH = dB = dw = None
    factor_P1 = (weights_TK * scale).view(-1, 1)
    if need_H or need_weights:
        Bt_ELO = B_EOL.transpose(1, 2)
        if how != "dense":
            U_PL = _sorted_down(dy_TO, Bt_ELO, plan).float()
            kept_P = plan.expert_P < plan.num_experts
            # what a dropped pair holds may be anything, also NaN
            dw = torch.where(kept_P, (U_PL * H_PL).sum(-1).mul_(scale), 0.0).view_as(weights_TK)
            dH = torch.where(kept_P[:, None], U_PL * factor_P1, 0.0).to(H_PL.dtype)
        else:
            dH, dw = launch.down_dense(dy_TO, Bt_ELO, plan, weights=weights_TK, kept_PL=H_PL, scale=scale)
    if need_B:
        G_PL = (H_PL * factor_P1).to(H_PL.dtype).index_select(0, plan.order_P)
        dB = gram(dy_TO.to(G_PL.dtype), G_PL, B_EOL, plan, gather_dz=True)[0]
    return dH if need_H else None, dB, dw if need_weights else None
