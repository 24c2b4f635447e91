"""Naive token compaction and weighted add: the definition the other implementations must equal.

    gather:  x_N[n] = x_T[index_N[n]],  index_N = the kept tokens in ascending order, -1 in unused slots (their rows are 0)
    scatter: y_T[index_N[n]] = base_T[index_N[n]] + weights_T[index_N[n]] * y_N[n];  all other rows are base_T's

Not here: the choice which tokens are kept (a router's), and more than one unit a token (`route_plan` and `lora_experts`).
Shapes: T tokens, N slots, D width.
"""

import torch
from torch import Tensor


def token_index(keep_T: Tensor, bound: int) -> Tensor:
    """Return the positions of the kept tokens, ascending, in a buffer whose size does not depend on them.

    Args:
        keep_T: bool `[T]`.
        bound: Number of slots; kept tokens beyond it get none.

    Returns:
        int64 `[bound]`, -1 in unused slots.
    """
    slot_T = keep_T.to(torch.int64).cumsum(0) - 1
    # one extra slot swallows the tokens that get none, so that no write needs a mask
    slot_T = torch.where(keep_T & (slot_T < bound), slot_T, bound)
    token_T = torch.arange(keep_T.shape[0], device=keep_T.device)
    return torch.full((bound + 1,), -1, device=keep_T.device).scatter(0, slot_T, token_T)[:bound]


def token_gather(x_TD: Tensor, index_N: Tensor) -> Tensor:
    """Return the rows of `x_TD` named by `index_N`, zero rows for -1.

    Args:
        x_TD: `[T, D]`.
        index_N: int64 `[N]`.

    Returns:
        `[N, D]` of `x_TD`'s dtype.
    """
    used_N1 = (index_N >= 0)[:, None]
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(index_N.shape[0], x_TD.shape[1])
    return torch.where(used_N1, x_TD[index_N.clamp_min(0)], 0)


def token_scatter(y_ND: Tensor, index_N: Tensor, base_TD: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """Return `base_TD` with `weights_T * y_ND` added at the rows named by `index_N`.

    Args:
        y_ND: `[N, D]`.
        index_N: int64 `[N]`, no token twice, -1 in unused slots.
        base_TD: `[T, D]`.
        weights_T: float32 `[T]`; None = 1.

    Returns:
        `[T, D]` of `base_TD`'s dtype; the sum is made in float32 (float64 for float64 inputs).
    """
    wide = torch.promote_types(torch.promote_types(y_ND.dtype, base_TD.dtype), torch.float32)
    T, D = base_TD.shape
    if index_N.shape[0] == 0:
        return base_TD.clone()
    weights = torch.ones(T, dtype=wide, device=base_TD.device) if weights_T is None else weights_T.to(wide)
    # a spare last row takes what the unused slots hold
    row_N = torch.where(index_N >= 0, index_N, T)
    weights_N1 = torch.cat([weights, weights.new_zeros(1)])[row_N][:, None]
    y_ND = torch.where(index_N[:, None] >= 0, y_ND, 0)
    delta = torch.zeros(T + 1, D, dtype=wide, device=base_TD.device).index_add(0, row_N, weights_N1 * y_ND.to(wide))
    return (base_TD.to(wide) + delta[:T]).to(base_TD.dtype)
