"""Triton kernels of the grouped products, with fused epilogues; sums over rows are in `triton_sums.py`.

    grouped_mm_kernel       y_p = residual_p + weight_p * act(x_p W_e^T + b_e); forward, and dX with W's strides swapped
    grouped_mm_dact_kernel  t_p = dy_p W_e, and at once dz, w h and the partial sums of <t, h>: the step through the activation

Addresses are 64 bit (offsets inside a tile 32 bit), every tail is masked, sums are fp32 in
one fixed order, there are no atomics. Rows come through an index in the load (gather) and leave through one in the store
(scatter); the work lists of `route_plan.tiles` name a tile's expert.

Shapes: P sorted rows, D contraction width, O width out, BM x BN x BK tiles.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _act(z, ACTIVATION: tl.constexpr):
    """Return act(z) in fp32."""
    if ACTIVATION == "silu":
        return z * _sigmoid(z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u)
        return z * _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0)
    elif ACTIVATION == "relu2":
        return tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    else:
        return z


@triton.jit
def _dact(z, ACTIVATION: tl.constexpr):
    """Return act'(z) in fp32."""
    if ACTIVATION == "silu":
        s = _sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        return 2.0 * tl.maximum(z, 0.0)
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _product(
    x_rows,
    w_columns,
    mask_m,
    mask_n,
    D,
    stride_xd,
    stride_wd,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the fp32 tile x W^T: `x_rows` [BM] row pointers, `w_columns` [BN] pointers to the rows of W."""
    offs_k = tl.arange(0, BK)
    x_ptrs = x_rows[:, None] + offs_k[None, :].to(tl.int64) * stride_xd
    w_ptrs = w_columns[None, :] + offs_k[:, None].to(tl.int64) * stride_wd
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, tl.cdiv(D, BK)):
        if EVEN_D:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < D - k * BK
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BK * stride_xd
        w_ptrs += BK * stride_wd
    return acc


@triton.jit
def _product_pair(
    x_rows,
    w_columns,
    v_columns,
    mask_m,
    mask_n,
    D,
    stride_xd,
    stride_wd,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the fp32 tiles x W^T and x V^T in one pass over x."""
    offs_k = tl.arange(0, BK)
    x_ptrs = x_rows[:, None] + offs_k[None, :].to(tl.int64) * stride_xd
    w_ptrs = w_columns[None, :] + offs_k[:, None].to(tl.int64) * stride_wd
    v_ptrs = v_columns[None, :] + offs_k[:, None].to(tl.int64) * stride_wd
    acc_w = tl.zeros((BM, BN), dtype=tl.float32)
    acc_v = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, tl.cdiv(D, BK)):
        if EVEN_D:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < D - k * BK
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc_w = tl.dot(x, w, acc_w, input_precision=PRECISION)
        acc_v = tl.dot(x, v, acc_v, input_precision=PRECISION)
        x_ptrs += BK * stride_xd
        w_ptrs += BK * stride_wd
        v_ptrs += BK * stride_wd
    return acc_w, acc_v


@triton.jit
def _tile(tile_expert_ptr, tile_start_ptr, tile_end_ptr, num_tiles, num_n, GROUP: tl.constexpr):
    """Return (expert, first row, end of the group, column block): GROUP row tiles share a sweep over the columns."""
    pid = tl.program_id(0)
    group = pid // (GROUP * num_n)
    first = group * GROUP
    height = tl.minimum(num_tiles - first, GROUP)
    tile = first + (pid % (GROUP * num_n)) % height
    column = (pid % (GROUP * num_n)) // height
    return tl.load(tile_expert_ptr + tile), tl.load(tile_start_ptr + tile), tl.load(tile_end_ptr + tile), column


@triton.jit
def grouped_mm_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    z_ptr,
    bias_ptr,
    weight_ptr,
    residual_ptr,
    source_ptr,
    target_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles,
    num_experts,
    D,
    O,
    stride_xm,
    stride_we,
    stride_wo,
    stride_wd,
    stride_ym,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One [BM, BN] tile of the result; O is its width. With GATED, W has 2 O rows, the gate's first."""
    expert, start, end, column = _tile(tile_expert_ptr, tile_start_ptr, tile_end_ptr, num_tiles, tl.cdiv(O, BN), GROUP)
    if expert < 0:
        return
    rows = start + tl.arange(0, BM)
    mask_m = rows < end
    offs_n = column * BN + tl.arange(0, BN)
    mask_n = offs_n < O
    mask = mask_m[:, None] & mask_n[None, :]
    target = rows
    if SCATTER or WEIGHTS:
        target = tl.load(target_ptr + rows, mask=mask_m, other=0)
    y_rows = (target if SCATTER else rows).to(tl.int64)
    y = tl.zeros((BM, BN), dtype=tl.float32)
    # rows of dropped pairs multiply nothing: they only get written
    if expert < num_experts:
        source = rows
        if GATHER:
            source = tl.load(source_ptr + rows, mask=mask_m, other=0)
        x_rows = x_ptr + source.to(tl.int64) * stride_xm
        w_expert = w_ptr + expert.to(tl.int64) * stride_we
        w_columns = w_expert + offs_n.to(tl.int64) * stride_wo
        width = O * 2 if GATED else O
        bias_row = bias_ptr + expert.to(tl.int64) * width + offs_n
        z_ptrs = z_ptr + start * width + (tl.arange(0, BM)[:, None] * width + offs_n[None, :])
        up = y
        if GATED:
            v_columns = w_expert + (offs_n.to(tl.int64) + O) * stride_wo
            y, up = _product_pair(
                x_rows, w_columns, v_columns, mask_m, mask_n, D, 1, stride_wd, EVEN_D, PRECISION, BM, BN, BK
            )
        else:
            y = _product(x_rows, w_columns, mask_m, mask_n, D, 1, stride_wd, EVEN_D, PRECISION, BM, BN, BK)
        if BIAS:
            y += tl.load(bias_row, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(z_ptrs, y.to(z_ptr.dtype.element_ty), mask=mask)
        y = _act(y, ACTIVATION)
        if GATED:
            if BIAS:
                up += tl.load(bias_row + O, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            if KEEP:
                tl.store(z_ptrs + O, up.to(z_ptr.dtype.element_ty), mask=mask)
            y = y * up
        if WEIGHTS:
            y *= tl.load(weight_ptr + target, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    elif KEEP:
        width = O * 2 if GATED else O
        z_ptrs = z_ptr + start * width + (tl.arange(0, BM)[:, None] * width + offs_n[None, :])
        tl.store(z_ptrs, y.to(z_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(z_ptrs + O, y.to(z_ptr.dtype.element_ty), mask=mask)
    if RESIDUAL:
        residual_ptrs = residual_ptr + y_rows[:, None] * O + offs_n[None, :]
        y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_rows[:, None] * stride_ym + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_mm_dact_kernel(
    dy_ptr,
    w_ptr,
    z_ptr,
    weight_ptr,
    dz_ptr,
    wh_ptr,
    dot_ptr,
    source_ptr,
    target_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    num_tiles,
    num_experts,
    D,
    H,
    stride_ym,
    stride_we,
    stride_wh,
    stride_wd,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One [BM, BN] tile of t = dy W with the activation's gradient in the epilogue.

    Writes dz (both halves when GATED), w h (what dV multiplies) and, in column `column` of [P, columns], the part of
    <t, h> that this tile sees; the caller sums those few columns in a fixed order.
    """
    num_n = tl.cdiv(H, BN)
    expert, start, end, column = _tile(tile_expert_ptr, tile_start_ptr, tile_end_ptr, num_tiles, num_n, GROUP)
    if expert < 0:
        return
    rows = start + tl.arange(0, BM)
    mask_m = rows < end
    offs_n = column * BN + tl.arange(0, BN)
    mask_n = offs_n < H
    mask = mask_m[:, None] & mask_n[None, :]
    rows = rows.to(tl.int64)
    t = tl.zeros((BM, BN), dtype=tl.float32)
    weight = tl.zeros((BM,), dtype=tl.float32)
    if expert < num_experts:
        source = rows
        if GATHER:
            source = tl.load(source_ptr + rows, mask=mask_m, other=0)
        w_columns = w_ptr + expert.to(tl.int64) * stride_we + offs_n.to(tl.int64) * stride_wh
        dy_rows = dy_ptr + source.to(tl.int64) * stride_ym
        t = _product(dy_rows, w_columns, mask_m, mask_n, D, 1, stride_wd, EVEN_D, PRECISION, BM, BN, BK)
        target = tl.load(target_ptr + rows, mask=mask_m, other=0)
        weight = tl.load(weight_ptr + target, mask=mask_m, other=0.0).to(tl.float32)
    # one 64-bit base a tile, 32-bit offsets inside it: half the registers of 64-bit addresses
    width = H * 2 if GATED else H
    at = tl.arange(0, BM)[:, None] * width + offs_n[None, :]
    z_ptr += start * width
    dz_ptr += start * width
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    h = _act(z, ACTIVATION)
    dh = t * weight[:, None]
    if GATED:
        up = tl.load(z_ptr + H + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dz_ptr + H + at, (dh * h).to(dz_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + at, (dh * up * _dact(z, ACTIVATION)).to(dz_ptr.dtype.element_ty), mask=mask)
        h = h * up
    else:
        tl.store(dz_ptr + at, (dh * _dact(z, ACTIVATION)).to(dz_ptr.dtype.element_ty), mask=mask)
    wh_ptrs = wh_ptr + start * H + (tl.arange(0, BM)[:, None] * H + offs_n[None, :])
    tl.store(wh_ptrs, (h * weight[:, None]).to(wh_ptr.dtype.element_ty), mask=mask)
    tl.store(dot_ptr + rows * num_n + column, tl.sum(tl.where(mask, t * h, 0.0), 1), mask=mask_m)
