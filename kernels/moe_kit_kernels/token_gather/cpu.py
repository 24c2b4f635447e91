"""Plain PyTorch token compaction with as few passes as possible: forward and backward of gather and scatter.

On the CPU the number of kept tokens is read on the host, so unused slots cost nothing. On other devices nothing waits
for the device: all slots are processed, unused ones on a clamped index with a zero factor.
"""

import torch
from torch import Tensor


def _used(index_N: Tensor) -> Tensor:
    """Return the used front part of `index_N` (slots are filled from the front)."""
    if index_N.device.type != "cpu" or index_N.shape[0] == 0 or int(index_N[-1]) >= 0:
        return index_N
    return index_N[: int((index_N >= 0).sum())]


def gather(x_TD: Tensor, index_N: Tensor) -> Tensor:
    """Return the rows of `x_TD [T, D]` named by `index_N`, zero rows for -1: `[N, D]`."""
    used = _used(index_N)
    if used.shape[0] == index_N.shape[0] and index_N.device.type == "cpu":
        return x_TD.index_select(0, index_N)
    if index_N.device.type == "cpu":
        out = x_TD.new_zeros(index_N.shape[0], x_TD.shape[1])
        torch.index_select(x_TD, 0, used, out=out[: used.shape[0]])
        return out
    return x_TD.index_select(0, index_N.clamp_min(0)).masked_fill_((index_N < 0)[:, None], 0)


def spread(x_ND: Tensor, index_N: Tensor, num_tokens: int) -> Tensor:
    """Return zeros `[num_tokens, D]` with `x_ND` written at the rows of `index_N`: the gradient of `gather`."""
    if index_N.device.type == "cpu":
        used = _used(index_N)
        return x_ND.new_zeros(num_tokens, x_ND.shape[1]).index_copy_(0, used, x_ND[: used.shape[0]])
    row_N = torch.where(index_N >= 0, index_N, num_tokens)
    # every unused slot writes the spare row, whose content nobody reads
    return x_ND.new_zeros(num_tokens + 1, x_ND.shape[1]).index_copy_(0, row_N, x_ND)[:num_tokens]


def scatter(y_ND: Tensor, index_N: Tensor, base_TD: Tensor | None, num_tokens: int, weights_T: Tensor | None) -> Tensor:
    """Return `base_TD` plus `weights_T * y_ND` at the rows of `index_N`, summed in at least float32: `[T, D]`."""
    if base_TD is None:
        return _place(y_ND, index_N, num_tokens, weights_T)
    wide = torch.promote_types(torch.promote_types(y_ND.dtype, base_TD.dtype), torch.float32)
    if index_N.device.type == "cpu":
        used = _used(index_N)
        y_ND = y_ND[: used.shape[0]]
        rows = base_TD.index_select(0, used).to(wide)
        if weights_T is None:
            rows = rows.add_(y_ND)
        else:
            rows = rows.addcmul_(y_ND.to(wide), weights_T.index_select(0, used).to(wide)[:, None])
        return base_TD.clone().index_copy_(0, used, rows.to(base_TD.dtype))
    delta = y_ND.to(wide)
    if weights_T is not None:
        delta = delta * weights_T.index_select(0, index_N.clamp_min(0)).to(wide)[:, None]
    return (base_TD.to(wide) + spread(delta, index_N, base_TD.shape[0])).to(base_TD.dtype)


def _place(y_ND: Tensor, index_N: Tensor, num_tokens: int, weights_T: Tensor | None) -> Tensor:
    """Return `scatter` on zeros, which need not be read."""
    if weights_T is not None:
        used = _used(index_N)
        index_N, y_ND = used, y_ND[: used.shape[0]]
        wide = torch.promote_types(y_ND.dtype, torch.float32)
        weight_N = weights_T.index_select(0, used.clamp_min(0)).to(wide)
        y_ND = (y_ND.to(wide) * weight_N[:, None]).to(y_ND.dtype)
    return spread(y_ND, index_N, num_tokens)


def scatter_backward(
    dy_TD: Tensor, y_ND: Tensor, index_N: Tensor, weights_T: Tensor | None, need_y: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `y_ND` and `weights_T` (None where not needed).

    dy_N = weights[index] * dy[index];  dweights[index] = <dy[index], y_N>, zero at all other tokens
    """
    if not (need_y or need_weights):
        return None, None
    dy_ND = gather(dy_TD, index_N)
    dweights_T = None
    if need_weights and weights_T is not None:
        wide = torch.promote_types(dy_ND.dtype, weights_T.dtype)
        dot_N = torch.linalg.vecdot(dy_ND.to(wide), y_ND.to(wide))
        # unused slots have dy = 0, but their y may hold anything, also NaN
        dot_N = dot_N.masked_fill(index_N < 0, 0)
        dweights_T = spread(dot_N[:, None], index_N, dy_TD.shape[0])[:, 0].to(weights_T.dtype)
    if not need_y:
        return None, dweights_T
    if weights_T is not None and weights_T.shape[0]:
        dy_ND = dy_ND * weights_T.index_select(0, index_N.clamp_min(0))[:, None]
    return dy_ND.to(y_ND.dtype), dweights_T
