"""Triton kernels of routed LoRA experts on one dense base.

    lora_down_dense_kernel   H_tk = x_t A_e(t,k)^T: all experts' columns are computed, only chosen slices stored.
                             In the backward the same product dy B gives U, and at once dH = scale w U and
                             dw = scale <H, U>, while both are in registers
    lora_up_dense_kernel     y_t = [x_t W^T + bias | base_t] + sum_k (scale w_tk H_tk) B_e(t,k)^T: reads and writes y
                             once; with W inside it is the base layer as well (K-extension); with A for B it is dx
    lora_up_sorted_kernel    the same sum for one slot on tokens sorted by expert: y is read, added to and written
    lora_decode_*_kernel     one program a pair (down) or a token (up): no sort, reads the chosen experts only

Columns are experts by LP ranks, LP a power of two, so that any rank works by masking; storage is never padded. In the
down kernel no expert straddles a column block (EB whole experts), since its gate's gradient is a sum over the ranks. Addresses are 64 bit, every tail is masked, products accumulate in fp32 in
one fixed order, there are no atomics: results repeat bit by bit.

Shapes: T tokens, K slots a token, P = T*K pairs, E experts, D width in, O width out, L rank; BM x BN x BK tiles.

Source: dense compute with sparse store, and the gate's gradient in rank space, are this project's; the segmented
order is that of Punica's SGMV (arXiv 2310.18547).
"""

import triton
import triton.language as tl


@triton.jit
def _product(
    acc, left_rows, right_columns, mask_m, mask_n, D, stride_l, stride_r, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Add left right^T to acc; both are pointers to rows that run along D."""
    offs_k = tl.arange(0, BK)
    left = left_rows[:, None] + offs_k[None, :].to(tl.int64) * stride_l
    right = right_columns[None, :] + offs_k[:, None].to(tl.int64) * stride_r
    for k in range(0, tl.cdiv(D, BK)):
        if EVEN_D:
            x = tl.load(left, mask=mask_m[:, None], other=0.0)
            w = tl.load(right, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < D - k * BK
            x = tl.load(left, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(right, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
        left += BK * stride_l
        right += BK * stride_r
    return acc


@triton.jit
def lora_down_dense_kernel(
    x_ptr,
    a_ptr,
    ids_ptr,
    h_ptr,
    weights_ptr,
    kept_ptr,
    dw_ptr,
    scale,
    T,
    D,
    E,
    L,
    stride_xt,
    stride_ae,
    stride_al,
    stride_ad,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    EB: tl.constexpr,
    LP: tl.constexpr,
    BK: tl.constexpr,
):
    """H [T, K, L] from x [T, D] and A [E, L, D]; BACKWARD: dH and dw from dy, B and the kept H."""
    blocks = tl.cdiv(E, EB)
    # column blocks of one row tile run next to each other, so that x comes from memory once
    block = tl.program_id(0) % blocks
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    mask_m = rows < T
    c = tl.arange(0, EB * LP)
    e = block * EB + c // LP
    l = c % LP
    mask_c = (e < E) & (l < L)
    columns = a_ptr + e.to(tl.int64) * stride_ae + l.to(tl.int64) * stride_al
    acc = tl.zeros((BM, EB * LP), dtype=tl.float32)
    acc = _product(acc, x_ptr + rows * stride_xt, columns, mask_m, mask_c, D, 1, stride_ad, EVEN_D, PRECISION, BK)
    for k in tl.static_range(K):
        pair = rows * K + k
        expert = tl.load(ids_ptr + pair, mask=mask_m, other=-1)
        hit = (expert[:, None] == e[None, :]) & mask_c[None, :] & mask_m[:, None]
        target = pair[:, None] * L + l[None, :]
        value = acc
        if BACKWARD:
            kept = tl.load(kept_ptr + target, mask=hit, other=0.0).to(tl.float32)
            dw = scale * tl.sum(tl.where(hit, acc * kept, 0.0), axis=1)
            here = mask_m & (expert >= block * EB) & (expert < (block + 1) * EB) & (expert < E)
            tl.store(dw_ptr + pair, dw, mask=here)
            weight = tl.load(weights_ptr + pair, mask=mask_m, other=0.0)
            value = acc * (scale * weight)[:, None]
        tl.store(h_ptr + target, value.to(h_ptr.dtype.element_ty), mask=hit)


@triton.jit
def lora_up_dense_kernel(
    h_ptr,
    b_ptr,
    ids_ptr,
    weights_ptr,
    base_ptr,
    y_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    scale,
    T,
    O,
    D,
    E,
    L,
    stride_be,
    stride_bo,
    stride_bl,
    stride_base,
    stride_xt,
    stride_wo,
    stride_wd,
    K: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BASE: tl.constexpr,
    LINEAR: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    LP: tl.constexpr,
):
    """y [T, O] from H [T, K, L] and B [E, O, L], plus base [T, O] or x W^T + bias computed here."""
    num_n = tl.cdiv(O, BN)
    rows = (tl.program_id(0) // num_n).to(tl.int64) * BM + tl.arange(0, BM)
    cols = (tl.program_id(0) % num_n) * BN + tl.arange(0, BN)
    mask_m = rows < T
    mask_n = cols < O
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if LINEAR:
        acc = _product(
            acc, x_ptr + rows * stride_xt, w_ptr + cols.to(tl.int64) * stride_wo, mask_m, mask_n, D,
            1, stride_wd, EVEN_D, PRECISION, BK,
        )  # fmt: skip
    # ids and weights of the rows, once for all blocks of columns
    experts = ()
    factors = ()
    for k in tl.static_range(K):
        expert = tl.load(ids_ptr + rows * K + k, mask=mask_m, other=-1).to(tl.int32)
        experts = experts + (expert,)  # noqa: RUF005 (Triton joins tuples by +)
        if WEIGHTS:
            # a dropped pair's weight counts nowhere, and may be NaN
            weight = tl.load(weights_ptr + rows * K + k, mask=mask_m & (expert < E), other=0.0)
            factors = factors + (scale * weight,)  # noqa: RUF005
    # no pipeline here: staging the gathered slices of H would cost more shared memory than the tile itself
    for block in tl.range(0, tl.cdiv(E * LP, BC), num_stages=1):
        c = block * BC + tl.arange(0, BC)
        e = c // LP
        l = c % LP
        mask_c = (e < E) & (l < L)
        gated = tl.zeros((BM, BC), dtype=tl.float32)
        for k in tl.static_range(K):
            hit = (experts[k][:, None] == e[None, :]) & mask_c[None, :] & mask_m[:, None]
            h = tl.load(h_ptr + (rows * K + k)[:, None] * L + l[None, :], mask=hit, other=0.0).to(tl.float32)
            if WEIGHTS:
                h = h * factors[k][:, None]
            gated += h
        b = tl.load(
            b_ptr
            + e[:, None].to(tl.int64) * stride_be
            + l[:, None].to(tl.int64) * stride_bl
            + cols[None, :].to(tl.int64) * stride_bo,
            mask=mask_c[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = tl.dot(gated.to(b.dtype), b, acc, input_precision=PRECISION)
    mask = mask_m[:, None] & mask_n[None, :]
    if BASE:
        acc += tl.load(base_ptr + rows[:, None] * stride_base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * O + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_up_sorted_kernel(
    h_ptr,
    b_ptr,
    weights_ptr,
    base_ptr,
    y_ptr,
    token_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    tile_end_ptr,
    scale,
    slot,
    first_column,
    end_column,
    O,
    E,
    L,
    stride_be,
    stride_bo,
    stride_bl,
    stride_base,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
):
    """Add one slot's contribution to the columns [first_column, end_column) of y; FIRST also takes the base over."""
    num_n = tl.cdiv(end_column - first_column, BN)
    tile = tl.program_id(0) // num_n
    expert = tl.load(tile_expert_ptr + tile)
    if (expert < 0) | ((expert >= E) & (not FIRST)):
        return
    start = tl.load(tile_start_ptr + tile)
    end = tl.load(tile_end_ptr + tile)
    position = start + tl.arange(0, BM)
    mask_m = position < end
    token = tl.load(token_ptr + position, mask=mask_m, other=0).to(tl.int64)
    cols = first_column + (tl.program_id(0) % num_n) * BN + tl.arange(0, BN)
    mask_n = cols < end_column
    mask = mask_m[:, None] & mask_n[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if expert < E:
        pair = token * K + slot
        if WEIGHTS:
            weight = scale * tl.load(weights_ptr + pair, mask=mask_m, other=0.0)
        for block in tl.range(0, tl.cdiv(L, BL), num_stages=1):
            l = block * BL + tl.arange(0, BL)
            mask_l = l < L
            h = tl.load(h_ptr + pair[:, None] * L + l[None, :], mask=mask_m[:, None] & mask_l[None, :], other=0.0)
            if WEIGHTS:
                h = (h.to(tl.float32) * weight[:, None]).to(b_ptr.dtype.element_ty)
            b = tl.load(
                b_ptr
                + expert.to(tl.int64) * stride_be
                + l[:, None].to(tl.int64) * stride_bl
                + cols[None, :].to(tl.int64) * stride_bo,
                mask=mask_l[:, None] & mask_n[None, :],
                other=0.0,
            )
            acc = tl.dot(h.to(b.dtype), b, acc, input_precision=PRECISION)
    y_ptrs = y_ptr + token[:, None] * O + cols[None, :]
    if FIRST:
        if BASE:
            acc += tl.load(base_ptr + token[:, None] * stride_base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_decode_down_kernel(
    x_ptr,
    a_ptr,
    ids_ptr,
    h_ptr,
    D,
    E,
    L,
    stride_xt,
    stride_ae,
    stride_al,
    stride_ad,
    K: tl.constexpr,
    LP: tl.constexpr,
    BK: tl.constexpr,
):
    """H of one pair; 0 for an empty slot."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + pair)
    l = tl.arange(0, LP)
    sums = tl.zeros((LP,), dtype=tl.float32)
    if (expert >= 0) & (expert < E):
        for k in range(0, tl.cdiv(D, BK)):
            d = k * BK + tl.arange(0, BK)
            x = tl.load(x_ptr + (pair // K) * stride_xt + d, mask=d < D, other=0.0).to(tl.float32)
            a = tl.load(
                a_ptr
                + expert.to(tl.int64) * stride_ae
                + l[:, None].to(tl.int64) * stride_al
                + d[None, :].to(tl.int64) * stride_ad,
                mask=(l < L)[:, None] & (d < D)[None, :],
                other=0.0,
            ).to(tl.float32)
            sums += tl.sum(a * x[None, :], axis=1)
    tl.store(h_ptr + pair * L + l, sums.to(h_ptr.dtype.element_ty), mask=l < L)


@triton.jit
def lora_decode_up_kernel(
    h_ptr,
    b_ptr,
    ids_ptr,
    weights_ptr,
    base_ptr,
    y_ptr,
    scale,
    O,
    E,
    L,
    stride_be,
    stride_bo,
    stride_bl,
    stride_base,
    K: tl.constexpr,
    BASE: tl.constexpr,
    BN: tl.constexpr,
    LP: tl.constexpr,
):
    """A block of one token's result, slots added in order."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_n = cols < O
    l = tl.arange(0, LP)
    acc = tl.zeros((BN,), dtype=tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        expert = tl.load(ids_ptr + pair)
        if (expert >= 0) & (expert < E):
            weight = scale * tl.load(weights_ptr + pair)
            h = tl.load(h_ptr + pair * L + l, mask=l < L, other=0.0).to(tl.float32) * weight
            b = tl.load(
                b_ptr
                + expert.to(tl.int64) * stride_be
                + cols[:, None].to(tl.int64) * stride_bo
                + l[None, :].to(tl.int64) * stride_bl,
                mask=mask_n[:, None] & (l < L)[None, :],
                other=0.0,
            ).to(tl.float32)
            acc += tl.sum(b * h[None, :], axis=1)
    if BASE:
        acc += tl.load(base_ptr + token * stride_base + cols, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * O + cols, acc.to(y_ptr.dtype.element_ty), mask=mask_n)
