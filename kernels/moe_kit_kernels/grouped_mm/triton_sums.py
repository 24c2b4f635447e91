"""Triton kernels that sum over rows: weight gradients over an expert's rows, results over a token's rows.

    grouped_gram_kernel     dW_e = sum_p dz_p^T x_p and db_e = sum_p dz_p, every expert written
    split_sum_kernel        adds the parts of an expert whose rows several programs shared
    combine_kernel          y_t = sum of the rows of t's pairs, in fp32, in slot order

Addresses are 64 bit, every tail is masked, sums are fp32 in one fixed order, there are no atomics: results repeat bit by
bit, also where an expert's rows are split. The chunks are those of `route_plan.chunk_map`, largest first.

Shapes: P sorted rows, O and D widths of dz and x, BO x BD tiles of a gradient, BR rows a step.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_gram_kernel(
    dz_ptr,
    x_ptr,
    dw_ptr,
    db_ptr,
    row_scale_ptr,
    source_z_ptr,
    source_x_ptr,
    chunk_expert_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    first_slot_ptr,
    slot_ptr,
    part_w_ptr,
    part_b_ptr,
    O,
    D,
    stride_zm,
    stride_xm,
    stride_we,
    stride_wo,
    stride_wd,
    GATHER_Z: tl.constexpr,
    GATHER_X: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """One [BO, BD] tile of one chunk's part of dW; with BIAS the first column of tiles also writes db.

    Rows of dz are multiplied by `row_scale` (sorted order) where SCALE; an expert without rows writes zeros. An expert of
    several chunks (only where SPLIT) gets fp32 parts in the workspace [slots, O, D], which `split_sum_kernel` adds in order.
    """
    chunk = tl.program_id(1)
    expert = tl.load(chunk_expert_ptr + chunk).to(tl.int64)
    if expert < 0:
        return
    num_d = tl.cdiv(D, BD)
    offs_o = (tl.program_id(0) // num_d) * BO + tl.arange(0, BO)
    offs_d = (tl.program_id(0) % num_d) * BD + tl.arange(0, BD)
    mask_o = offs_o < O
    mask_d = offs_d < D
    start = tl.load(chunk_start_ptr + chunk)
    end = tl.load(chunk_end_ptr + chunk)
    acc = tl.zeros((BO, BD), dtype=tl.float32)
    total = tl.zeros((BO,), dtype=tl.float32)
    for row in range(start, end, BR):
        rows = row + tl.arange(0, BR).to(tl.int64)
        mask_r = rows < end
        row_z = rows
        if GATHER_Z:
            row_z = tl.load(source_z_ptr + rows, mask=mask_r, other=0)
        row_x = rows
        if GATHER_X:
            row_x = tl.load(source_x_ptr + rows, mask=mask_r, other=0)
        dz_ptrs = dz_ptr + row_z[:, None] * stride_zm + offs_o[None, :]
        dz = tl.load(dz_ptrs, mask=mask_r[:, None] & mask_o[None, :], other=0.0)
        if SCALE:
            scale = tl.load(row_scale_ptr + rows, mask=mask_r, other=0.0)
            dz = (dz.to(tl.float32) * scale[:, None]).to(dz_ptr.dtype.element_ty)
        x_ptrs = x_ptr + row_x[:, None] * stride_xm + offs_d[None, :]
        x = tl.load(x_ptrs, mask=mask_r[:, None] & mask_d[None, :], other=0.0)
        acc = tl.dot(tl.trans(dz), x, acc, input_precision=PRECISION)
        if BIAS:
            total += tl.sum(dz.to(tl.float32), 0)
    mask = mask_o[:, None] & mask_d[None, :]
    first_column = mask_o & ((offs_o * 0 + tl.program_id(0) % num_d) == 0)
    if SPLIT:  # noqa: SIM102
        # two branches: `and` would read the slots in launches that have none
        if tl.load(first_slot_ptr + expert + 1) > tl.load(first_slot_ptr + expert):
            slot = tl.load(slot_ptr + chunk)
            part_ptrs = part_w_ptr + (slot * O + offs_o.to(tl.int64)[:, None]) * D + offs_d[None, :]
            tl.store(part_ptrs, acc, mask=mask)
            if BIAS:
                tl.store(part_b_ptr + slot * O + offs_o, total, mask=first_column)
            return
    dw_ptrs = dw_ptr + expert * stride_we + offs_o.to(tl.int64)[:, None] * stride_wo
    dw_ptrs += offs_d.to(tl.int64)[None, :] * stride_wd
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask)
    if BIAS:
        tl.store(db_ptr + expert * O + offs_o, total.to(db_ptr.dtype.element_ty), mask=first_column)


@triton.jit
def split_sum_kernel(
    part_ptr,
    dw_ptr,
    first_slot_ptr,
    O,
    D,
    stride_we,
    stride_wo,
    stride_wd,
    BO: tl.constexpr,
    BD: tl.constexpr,
):
    """One [BO, BD] tile of the sum of one expert's parts, slot by slot; an expert without slots is left alone."""
    expert = tl.program_id(1).to(tl.int64)
    first = tl.load(first_slot_ptr + expert)
    last = tl.load(first_slot_ptr + expert + 1)
    if first == last:
        return
    num_d = tl.cdiv(D, BD)
    offs_o = ((tl.program_id(0) // num_d) * BO + tl.arange(0, BO)).to(tl.int64)
    offs_d = ((tl.program_id(0) % num_d) * BD + tl.arange(0, BD)).to(tl.int64)
    mask = (offs_o < O)[:, None] & (offs_d < D)[None, :]
    acc = tl.zeros((BO, BD), dtype=tl.float32)
    for slot in range(first, last):
        acc += tl.load(part_ptr + (slot * O + offs_o[:, None]) * D + offs_d[None, :], mask=mask, other=0.0)
    dw_ptrs = dw_ptr + expert * stride_we + offs_o[:, None] * stride_wo + offs_d[None, :] * stride_wd
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    rows_ptr,
    y_ptr,
    weight_ptr,
    inverse_ptr,
    order_ptr,
    token_offsets_ptr,
    total_ptr,
    O,
    SLOTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BN: tl.constexpr,
):
    """One block of one token's result; SLOTS = K, or 0 where the plan holds free pairs."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = offs < O
    total = tl.load(total_ptr)
    acc = tl.zeros((BN,), dtype=tl.float32)
    if SLOTS > 0:
        first = token * SLOTS
        last = first + SLOTS
    else:
        first = tl.load(token_offsets_ptr + token)
        last = tl.load(token_offsets_ptr + token + 1)
    for j in range(first, last):
        pair = j
        if SLOTS == 0:
            pair = tl.load(order_ptr + j)
        position = tl.load(inverse_ptr + pair)
        # positions behind the last run are those of dropped pairs
        used = (position + offs * 0) < total
        row = tl.load(rows_ptr + position.to(tl.int64) * O + offs, mask=mask & used, other=0.0).to(tl.float32)
        if WEIGHTS:
            # a dropped pair's weight may be anything, also NaN
            row *= tl.where(used, tl.load(weight_ptr + pair).to(tl.float32), 0.0)
        acc += row
    tl.store(y_ptr + token * O + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)
