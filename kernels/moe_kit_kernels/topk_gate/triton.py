"""Triton kernels of top-k gating: choice, weights and load partials in one read of the logits, and the gradient.

    topk_gate_kernel           scores, K rounds of "largest value, lowest index", weights, per-program counts
    topk_gate_backward_kernel  dlogits [T, E] from dw [T, K], ids and scores recomputed from the logits

One row block holds all experts in registers. Counts leave as one row a program [programs, E] and are summed in fixed
order outside: no atomics. All arithmetic is fp32. The group limit is not here: it runs in plain PyTorch.

Shapes: T tokens, K slots a token, E experts, EP and KP = next powers of two of E and K, BM rows a program.

Source: the definition in `reference`.
"""

import triton
import triton.language as tl


@triton.jit
def _scores(x, SOFTMAX: tl.constexpr):
    """Softmax over, or sigmoid of, a tile [BM, EP] whose padding is -inf."""
    if SOFTMAX:
        e = tl.exp(x - tl.max(x, axis=1)[:, None])
        return e / tl.sum(e, axis=1)[:, None]
    else:
        return tl.sigmoid(x)


@triton.jit
def topk_gate_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    partial_ptr,
    scale,
    epsilon,
    T,
    E,
    stride_t,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BM: tl.constexpr,
    EP: tl.constexpr,
    KP: tl.constexpr,
):
    """Ids [T, K] int64, weights [T, K] fp32, partial counts [programs, E] int64."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    e = tl.arange(0, EP)
    mask_m = rows < T
    mask = mask_m[:, None] & (e < E)[None, :]
    x = tl.load(logits_ptr + rows[:, None] * stride_t + e[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.where((e < E)[None, :], x, float("-inf"))
    s = _scores(x, SOFTMAX)
    if BIAS:
        c = s + tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
        c = tl.where((e < E)[None, :], c, float("-inf"))
    else:
        c = x
    taken = tl.zeros((BM, EP), dtype=tl.int32)
    slots = tl.arange(0, KP)
    w = tl.zeros((BM, KP), dtype=tl.float32)
    for k in tl.static_range(K):
        # a chosen or padded expert is out, also where every free score is -inf
        free = (taken == 0) & (e < E)[None, :]
        best = tl.max(tl.where(free, c, float("-inf")), axis=1)
        expert = tl.min(tl.where(free & (c == best[:, None]), e[None, :], EP), axis=1)
        here = e[None, :] == expert[:, None]
        taken += here.to(tl.int32)
        chosen = tl.sum(tl.where(here, s, 0.0), axis=1)
        w = tl.where((slots == k)[None, :], chosen[:, None], w)
        tl.store(ids_ptr + rows * K + k, expert.to(tl.int64), mask=mask_m)
    if RENORMALIZE:
        w = w / (tl.sum(w, axis=1) + epsilon)[:, None]
    target = weights_ptr + rows[:, None] * K + slots[None, :]
    tl.store(target, w * scale, mask=mask_m[:, None] & (slots < K)[None, :])
    counts = tl.sum(tl.where(mask_m[:, None], taken, 0), axis=0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * E + e, counts.to(tl.int64), mask=e < E)


@triton.jit
def topk_gate_backward_kernel(
    logits_ptr,
    ids_ptr,
    dw_ptr,
    dlogits_ptr,
    scale,
    epsilon,
    T,
    E,
    stride_t,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BM: tl.constexpr,
    EP: tl.constexpr,
):
    """dlogits [T, E] fp32 from dw [T, K] fp32; scores are computed again, so nothing of width E was kept."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    e = tl.arange(0, EP)
    mask_m = rows < T
    mask = mask_m[:, None] & (e < E)[None, :]
    x = tl.load(logits_ptr + rows[:, None] * stride_t + e[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.where((e < E)[None, :], x, float("-inf"))
    s = _scores(x, SOFTMAX)
    g = tl.zeros((BM, EP), dtype=tl.float32)
    chosen = tl.zeros((BM, EP), dtype=tl.int32)
    # a real loop: unrolled, the loads of all slots are alive at once
    for k in range(K):
        expert = tl.load(ids_ptr + rows * K + k, mask=mask_m, other=0)
        dw = tl.load(dw_ptr + rows * K + k, mask=mask_m, other=0.0)
        here = e[None, :] == expert[:, None]
        g = tl.where(here, dw[:, None], g)
        chosen += here.to(tl.int32)
    g = g * scale
    if RENORMALIZE:
        # one reciprocal a row: a division an element takes a slow path with a stack of its own
        inverse = 1.0 / (tl.sum(tl.where(chosen > 0, s, 0.0), axis=1) + epsilon)
        ds = tl.where(chosen > 0, (g - (tl.sum(g * s, axis=1) * inverse)[:, None]) * inverse[:, None], 0.0)
    else:
        ds = g
    if SOFTMAX:
        dx = s * (ds - tl.sum(ds * s, axis=1)[:, None])
    else:
        dx = ds * s * (1.0 - s)
    tl.store(dlogits_ptr + rows[:, None] * E + e[None, :], dx, mask=mask)
