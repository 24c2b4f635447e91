"""Autograd functions of token compaction; forward and backward run in the implementation named by `backend`."""

from types import ModuleType

import torch
from torch import Tensor

from moe_kit_kernels.token_gather import cpu


def _implementation(backend: str) -> ModuleType:
    """Return the module with `gather`, `spread`, `scatter` and `scatter_backward`."""
    if backend == "triton":
        from moe_kit_kernels.token_gather import triton

        return triton
    return cpu


class TokenGather(torch.autograd.Function):
    """`x_ND = x_TD[index_N]`, zero rows for -1; saves the index only."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, index_N: Tensor, backend: str) -> Tensor:
        """Return the packed rows `[N, D]`."""
        ctx.save_for_backward(index_N)
        ctx.num_tokens, ctx.backend = x_TD.shape[0], backend
        return _implementation(backend).gather(x_TD, index_N)

    @staticmethod
    def backward(ctx, dx_ND: Tensor):
        """Return the gradient of `x_TD` and two Nones."""
        (index_N,) = ctx.saved_tensors
        return _implementation(ctx.backend).spread(dx_ND, index_N, ctx.num_tokens), None, None


class TokenScatter(torch.autograd.Function):
    """`base_TD` plus weighted `y_ND` at `index_N`; saves y only where the weights need a gradient."""

    @staticmethod
    def forward(
        ctx,
        y_ND: Tensor,
        index_N: Tensor,
        base_TD: Tensor | None,
        num_tokens: int,
        weights_T: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Return the sum `[T, D]`."""
        needs_y = weights_T is not None and ctx.needs_input_grad[4]
        # only the dtype of y matters where its values are not needed
        ctx.save_for_backward(y_ND if needs_y else y_ND.new_empty(0), index_N, weights_T)
        ctx.backend = backend
        return _implementation(backend).scatter(y_ND, index_N, base_TD, num_tokens, weights_T)

    @staticmethod
    def backward(ctx, dy_TD: Tensor):
        """Return the gradients of `y_ND`, `base_TD` and `weights_T`."""
        y_ND, index_N, weights_T = ctx.saved_tensors
        need_y, _, need_base, _, need_weights, _ = ctx.needs_input_grad
        dy_ND, dweights_T = _implementation(ctx.backend).scatter_backward(
            dy_TD, y_ND, index_N, weights_T, need_y, need_weights
        )
        return dy_ND, None, dy_TD if need_base else None, None, dweights_T, None
