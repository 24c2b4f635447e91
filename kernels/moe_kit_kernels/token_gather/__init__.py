"""Compaction of the tokens that run through a unit, and the weighted add of its result.

A skipped layer or block keeps a subset of the tokens: `token_gather` packs them, the unit runs on the short batch,
`token_scatter` adds what it returns. See `README.md` for equations and cost.

    x_ND, index_N = token_gather(x_TD, keep_T)
    y_TD = token_scatter(unit(x_ND), index_N, x_TD, weights_T=gate_T)

Shapes: T tokens, N slots (kept tokens, or a static bound), D width.
"""

import torch
from torch import Tensor

from moe_kit_kernels.errors import KernelError
from moe_kit_kernels.grouped_mm.backend import resolve_backend
from moe_kit_kernels.token_gather import reference
from moe_kit_kernels.token_gather.autograd import TokenGather, TokenScatter

__all__ = ["token_gather", "token_scatter"]


def token_gather(
    x_TD: Tensor, keep_T: Tensor, *, bound: int | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Pack the kept tokens, in their order.

    Args:
        x_TD: Tokens `[T, D]`, any floating dtype.
        keep_T: bool `[T]`.
        bound: Number of slots of the result. None: the number of kept tokens on the CPU (read on the host), T on other
            devices and under `torch.compile`, where nothing may wait for the device. A given bound makes every shape
            independent of the decision; it must be at least the number of kept tokens.
        backend: `"auto"`, `"cpu"` (plain PyTorch on any device), `"triton"` or `"reference"`.

    Returns:
        x_ND: `[N, D]`, zero rows in unused slots; differentiable.
        index_N: int64 `[N]`, ascending token positions, then -1.

    Raises:
        KernelError: Wrong shapes, dtypes or devices; `bound` negative or, on the CPU, smaller than the number of kept
            tokens (on other devices the check would cost a wait: tokens beyond the bound are treated as not kept).

    Example:
        >>> import torch
        >>> x_ND, index_N = token_gather(torch.arange(6.0).view(3, 2), torch.tensor([True, False, True]))
        >>> index_N.tolist(), x_ND.tolist()
        ([0, 2], [[0.0, 1.0], [4.0, 5.0]])
    """
    _check_tokens("token_gather", x_TD)
    if keep_T.dtype is not torch.bool or keep_T.shape != x_TD.shape[:1]:
        raise KernelError(
            f"token_gather: keep_T must be bool of shape {tuple(x_TD.shape[:1])}, got {keep_T.dtype} "
            f"{tuple(keep_T.shape)}; compare the gate with its threshold first"
        )
    _check_device("token_gather", x_TD, keep_T=keep_T)
    name = resolve_backend("token_gather", backend, x_TD.device, portable=True)
    if bound is not None and bound < 0:
        raise KernelError(f"token_gather: bound must be at least 0, got {bound}")
    if torch.compiler.is_compiling():
        index_N = reference.token_index(keep_T, x_TD.shape[0] if bound is None else bound)
        return reference.token_gather(x_TD, index_N), index_N
    if x_TD.device.type == "cpu":
        index_N = keep_T.nonzero().squeeze(1)
        if bound is not None and index_N.shape[0] != bound:
            if index_N.shape[0] > bound:
                raise KernelError(
                    f"token_gather: {index_N.shape[0]} tokens are kept but bound is {bound}; "
                    f"pass a larger bound (T = {x_TD.shape[0]} always suffices)"
                )
            index_N = torch.nn.functional.pad(index_N, (0, bound - index_N.shape[0]), value=-1)
    else:
        index_N = reference.token_index(keep_T, x_TD.shape[0] if bound is None else bound)
    if name == "reference":
        return reference.token_gather(x_TD, index_N), index_N
    return TokenGather.apply(x_TD, index_N, name), index_N


def token_scatter(
    y_ND: Tensor,
    index_N: Tensor,
    base_TD: Tensor | None,
    *,
    num_tokens: int | None = None,
    weights_T: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add the packed results, each times its token's weight, to `base_TD`; tokens without a slot keep their base.

    Args:
        y_ND: Results `[N, D]` of the unit on packed tokens.
        index_N: int64 `[N]` from `token_gather`: no token twice, used slots first, then -1. Several of them without
            unused slots may be concatenated.
        base_TD: `[T, D]`, usually the residual stream. Not modified. None: zeros, which are neither made nor read.
        num_tokens: T, where there is no base.
        weights_T: Weight of each token, `[T]` floating (float32 from a router); None = 1. Gets a gradient, zero for
            tokens without a slot.
        backend: As for `token_gather`.

    Returns:
        `[T, D]` of the dtype of `base_TD`, else of `y_ND`; the sum is made in at least float32, in one fixed order.

    Raises:
        KernelError: Wrong shapes, dtypes or devices; both or neither of `base_TD` and `num_tokens`.

    Example:
        >>> import torch
        >>> token_scatter(torch.ones(1, 2), torch.tensor([1]), torch.zeros(2, 2)).tolist()
        [[0.0, 0.0], [1.0, 1.0]]
    """
    _check_tokens("token_scatter", y_ND, "y_ND")
    if (base_TD is None) == (num_tokens is None):
        raise KernelError(
            f"token_scatter: got base_TD {'and' if base_TD is not None else 'None and no'} num_tokens; pass the base, or "
            "None and the number of tokens"
        )
    if base_TD is not None:
        _check_tokens("token_scatter", base_TD, "base_TD")
        if y_ND.shape[1] != base_TD.shape[1]:
            raise KernelError(
                f"token_scatter: y_ND has width {y_ND.shape[1]} but base_TD has width {base_TD.shape[1]}; they must agree"
            )
        num_tokens = base_TD.shape[0]
    if index_N.dtype is not torch.int64 or index_N.shape != y_ND.shape[:1]:
        raise KernelError(
            f"token_scatter: index_N must be int64 of shape {tuple(y_ND.shape[:1])}, got {index_N.dtype} "
            f"{tuple(index_N.shape)}; pass the index that token_gather returned"
        )
    _check_device(
        "token_scatter", y_ND if base_TD is None else base_TD, y_ND=y_ND, index_N=index_N, weights_T=weights_T
    )
    if weights_T is not None and (weights_T.shape != (num_tokens,) or not weights_T.is_floating_point()):
        raise KernelError(
            f"token_scatter: weights_T must be floating of shape {(num_tokens,)}, got {weights_T.dtype} "
            f"{tuple(weights_T.shape)}"
        )
    name = resolve_backend("token_scatter", backend, y_ND.device, portable=True)
    if name == "reference" or torch.compiler.is_compiling():
        base_TD = y_ND.new_zeros(num_tokens, y_ND.shape[1]) if base_TD is None else base_TD
        return reference.token_scatter(y_ND, index_N, base_TD, weights_T)
    return TokenScatter.apply(y_ND, index_N, base_TD, num_tokens, weights_T, name)


def _check_tokens(operator: str, x: Tensor, name: str = "x_TD") -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise KernelError(
            f"{operator}: {name} must be a floating tensor of two dimensions, got {x.dtype} {tuple(x.shape)}; "
            "flatten batch and sequence first"
        )


def _check_device(operator: str, base: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != base.device:
            raise KernelError(
                f"{operator}: {name} is on {tensor.device} but the tokens are on {base.device}; move it there"
            )
