"""Triton kernels of token compaction; same functions as `cpu.py`, for tensors on a GPU.

Scatter and spread run over tokens, not slots: each token looks up its slot (-1: none), so every output row has one writer
and no atomics are needed. Shapes: T tokens, N slots, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kit_kernels.common.device import on_its_device


@triton.jit
def gather_rows_kernel(x_ptr, index_ptr, out_ptr, D, stride_x, stride_out, BN: tl.constexpr):
    """One block of out[n] = x[index[n]], zeros for -1."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BN + tl.arange(0, BN)
    source = tl.load(index_ptr + row)
    used = (offs * 0 + source) >= 0
    x = tl.load(x_ptr + source * stride_x + offs, mask=(offs < D) & used, other=0.0)
    tl.store(out_ptr + row * stride_out + offs, x, mask=offs < D)


@triton.jit
def add_rows_kernel(
    base_ptr, y_ptr, weight_ptr, slot_ptr, out_ptr, D, stride_base, stride_y,
    BASE: tl.constexpr, WEIGHTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of out[t] = base[t] + weight[t] * y[slot[t]], base alone where the slot is -1; summed in fp32."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BN + tl.arange(0, BN)
    slot = tl.load(slot_ptr + token)
    used = (offs * 0 + slot) >= 0
    acc = tl.zeros((BN,), dtype=tl.float32)
    if BASE:
        acc = tl.load(base_ptr + token * stride_base + offs, mask=offs < D, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + slot * stride_y + offs, mask=(offs < D) & used, other=0.0).to(tl.float32)
    if WEIGHTS:
        # the weight of a token without a slot may be anything
        y = tl.where(used, y * tl.load(weight_ptr + token).to(tl.float32), 0.0)
    tl.store(out_ptr + token * D + offs, (acc + y).to(out_ptr.dtype.element_ty), mask=offs < D)


@triton.jit
def add_rows_backward_kernel(
    dy_ptr, y_ptr, weight_ptr, index_ptr, out_ptr, dot_ptr, D, stride_dy, stride_y,
    WEIGHTS: tl.constexpr, DOT: tl.constexpr, OUT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One slot: out[n] = weight * dy[index[n]] and dot[n] = <dy[index[n]], y[n]>; zeros for -1."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index_ptr + row)
    weight = 1.0
    if WEIGHTS:
        weight = tl.load(weight_ptr + tl.maximum(source, 0)).to(tl.float32)
    total = tl.zeros((BN,), dtype=tl.float32)
    for start in range(0, D, BN):
        offs = start + tl.arange(0, BN)
        mask = (offs < D) & ((offs * 0 + source) >= 0)
        dy = tl.load(dy_ptr + source * stride_dy + offs, mask=mask, other=0.0).to(tl.float32)
        if DOT:
            total += dy * tl.load(y_ptr + row * stride_y + offs, mask=mask, other=0.0).to(tl.float32)
        if OUT:
            tl.store(out_ptr + row * D + offs, (dy * weight).to(out_ptr.dtype.element_ty), mask=offs < D)
    if DOT:
        tl.store(dot_ptr + row, tl.sum(total, 0))


def _block(D: int) -> int:
    return min(1024, triton.next_power_of_2(max(1, D)))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _slot_T(index_N: Tensor, num_tokens: int) -> Tensor:
    """Return the slot of every token, -1 where it has none."""
    row_N = torch.where(index_N >= 0, index_N, num_tokens)
    slot_N = torch.arange(index_N.shape[0], device=index_N.device)
    return torch.full((num_tokens + 1,), -1, device=index_N.device).scatter_(0, row_N, slot_N)[:num_tokens]


@on_its_device
def gather(x_TD: Tensor, index_N: Tensor) -> Tensor:
    """Return the rows of `x_TD [T, D]` named by `index_N`, zero rows for -1: `[N, D]`."""
    x_TD, (N, D) = _rows(x_TD), (index_N.shape[0], x_TD.shape[1])
    out_ND = x_TD.new_empty(N, D)
    if N and D:
        grid = (N, triton.cdiv(D, _block(D)))
        gather_rows_kernel[grid](x_TD, index_N, out_ND, D, x_TD.stride(0), D, BN=_block(D))
    return out_ND


def spread(x_ND: Tensor, index_N: Tensor, num_tokens: int) -> Tensor:
    """Return zeros `[num_tokens, D]` with `x_ND` written at the rows of `index_N`: the gradient of `gather`."""
    return gather(x_ND, _slot_T(index_N, num_tokens))


@on_its_device
def scatter(y_ND: Tensor, index_N: Tensor, base_TD: Tensor | None, num_tokens: int, weights_T: Tensor | None) -> Tensor:
    """Return `base_TD` plus `weights_T * y_ND` at the rows of `index_N`, summed in float32: `[T, D]`."""
    if base_TD is None and weights_T is None:
        return spread(y_ND, index_N, num_tokens)
    y_ND, T, D = _rows(y_ND), num_tokens, y_ND.shape[1]
    # without a base the pointer is not read
    with_base, base_TD = base_TD is not None, y_ND if base_TD is None else _rows(base_TD)
    out_TD = base_TD.new_empty(T, D)
    if T and D:
        add_rows_kernel[(T, triton.cdiv(D, _block(D)))](
            base_TD,
            y_ND,
            weights_T.contiguous() if weights_T is not None else base_TD,
            _slot_T(index_N, T),
            out_TD,
            D,
            base_TD.stride(0),
            y_ND.stride(0),
            BASE=with_base,
            WEIGHTS=weights_T is not None,
            BN=_block(D),
        )
    return out_TD


@on_its_device
def scatter_backward(
    dy_TD: Tensor, y_ND: Tensor, index_N: Tensor, weights_T: Tensor | None, need_y: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `y_ND` and `weights_T` (None where not needed); equations in `cpu.py`."""
    if not (need_y or need_weights):
        return None, None
    dy_TD, N, (T, D) = _rows(dy_TD), index_N.shape[0], dy_TD.shape
    dy_ND = torch.empty(N if need_y else 0, D, dtype=y_ND.dtype, device=dy_TD.device)
    dot_N = torch.empty(N if need_weights else 0, dtype=torch.float32, device=dy_TD.device)
    if N and D and T:
        y_ND = _rows(y_ND) if need_weights else dy_TD
        add_rows_backward_kernel[(N,)](
            dy_TD,
            y_ND,
            weights_T.contiguous() if weights_T is not None else dy_TD,
            index_N,
            dy_ND if need_y else dy_TD,
            dot_N if need_weights else index_N,
            D,
            dy_TD.stride(0),
            y_ND.stride(0),
            WEIGHTS=weights_T is not None,
            DOT=need_weights,
            OUT=need_y,
            BN=_block(D),
        )
    dweights_T = None
    if need_weights:
        slot_T = _slot_T(index_N, T)
        padded = torch.cat([dot_N, dot_N.new_zeros(1)])
        # -1 names the zero behind the last slot
        dweights_T = padded[slot_T].to(weights_T.dtype)
    return dy_ND if need_y else None, dweights_T
