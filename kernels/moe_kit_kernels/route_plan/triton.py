"""Triton kernels of the routing plan: a counting sort in three launches, and the tiles in one or two.

A stable sort by a key of few values is counting, no sorting: with B blocks of pairs and experts 0..E (E = dropped),

    count_pairs     n[b, e]  = pairs of expert e in block b
    scan_counts     n[b, e] -> sum over b' < b of n[b', e];     offset[e] = sum over e' < e of its total
    place_pairs     position(p) = offset[e] + n[b, e] + (pairs of e before p in its block)

    list_tiles      an expert's tiles start behind those of all experts with more rows (equals: with a smaller number)
    order_tiles     a tile's place = how many tiles have an earlier first token (equals: are listed before)

The pairs of each slot of a table are sorted by the same launches (the sorted up product goes slot by slot).

No atomics: every result is the same in every run, and equal to that of the plain operations in `plan` and `tiles`, which
make some thirty launches of it. Nothing waits for the device. Ranks are counted by comparison, which is cheaper than it looks: a
block has 256 pairs, and there are as many tiles as experts and P / BM.

Legend: P pairs, E experts, EP = E + 1 rounded up to a power of two, G entries of a list of tiles, BM rows of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kit_kernels.common.device import on_its_device

BLOCK = 256
"""Pairs of a program."""
# numbers that a program of the scan holds at a time
_SCANNED = 4096
# pairs that a pair is compared with at a time; tiles whose place a program finds, and others it compares them with at a time
_COMPARED = 32
_TILES, _OTHERS = 32, 128


@triton.jit
def _sorting(P, slots, num_blocks, EP: tl.constexpr):
    """The second grid axis: sorting 0 is that of all pairs, sorting 1 + k that of slot k. Its size, first pair, stride, and where
    its counts and its results begin."""
    sorting = tl.program_id(1).to(tl.int64)
    own = sorting > 0
    tokens = P // slots
    size = tl.where(own, tokens, P)
    results = tl.where(own, P + (sorting - 1) * tokens, 0)
    return size, tl.maximum(sorting - 1, 0), tl.where(own, slots, 1), sorting * num_blocks * EP, results


@triton.jit
def count_pairs_kernel(expert_ptr, count_ptr, P, slots, BLOCK: tl.constexpr, EP: tl.constexpr):
    """Histogram of one block: n[b, e]."""
    size, base, step, count_at, _ = _sorting(P, slots, tl.num_programs(0), EP)
    block = tl.program_id(0).to(tl.int64)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + base + pair * step, mask=pair < size, other=0).to(tl.int32)
    counts = tl.histogram(expert, EP, mask=pair < size)
    tl.store(count_ptr + count_at + block * EP + tl.arange(0, EP), counts)


@triton.jit
def scan_counts_kernel(
    count_ptr, total_ptr, offset_ptr, num_blocks, num_experts, ROWS: tl.constexpr, EP: tl.constexpr
):  # fmt: skip
    """Exclusive sums over blocks in place, totals and offsets of all experts; one program a sorting."""
    sorting = tl.program_id(0).to(tl.int64)
    count_ptr += sorting * num_blocks * EP
    total_ptr += sorting * num_experts
    offset_ptr += sorting * (num_experts + 1)
    expert = tl.arange(0, EP)
    running = tl.zeros((EP,), dtype=tl.int32)
    for first in range(0, num_blocks, ROWS):
        row = first + tl.arange(0, ROWS)
        at = count_ptr + row.to(tl.int64)[:, None] * EP + expert[None, :]
        mask = (row < num_blocks)[:, None] & (expert >= 0)[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, running[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        running += tl.sum(counts, 0)
    tl.store(total_ptr + expert, running.to(tl.int64), mask=expert < num_experts)
    tl.store(offset_ptr + expert, (tl.cumsum(running, 0) - running).to(tl.int64), mask=expert <= num_experts)


@triton.jit
def place_pairs_kernel(
    expert_ptr, token_ptr, count_ptr, offset_ptr, order_ptr, inverse_ptr, sorted_token_ptr, sorted_expert_ptr,
    P, slots, num_experts, TABLE: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """One block: the sorted position of each pair, and what lies there."""
    size, base, step, count_at, results = _sorting(P, slots, tl.num_programs(0), EP)
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK
    pair = start + tl.arange(0, BLOCK)
    mask = pair < size
    expert = tl.load(expert_ptr + base + pair * step, mask=mask, other=0).to(tl.int32)
    local = tl.arange(0, BLOCK)
    rank = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, BLOCK, OTHERS):
        other = first + tl.arange(0, OTHERS)
        theirs = tl.load(expert_ptr + base + (start + other) * step, mask=start + other < size, other=-1).to(tl.int32)
        before = (theirs[None, :] == expert[:, None]) & (other[None, :] < local[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    offset_ptr += tl.program_id(1) * (num_experts + 1)
    position = tl.load(offset_ptr + expert, mask=mask, other=0) + rank
    position += tl.load(count_ptr + count_at + block * EP + expert, mask=mask, other=0)
    if TABLE:
        token = tl.where(step > 1, pair, pair // slots)
    else:
        token = tl.load(token_ptr + pair, mask=mask, other=0)
    tl.store(order_ptr + results + position, pair, mask=mask)
    tl.store(inverse_ptr + results + pair, position, mask=mask)
    tl.store(sorted_token_ptr + results + position, token, mask=mask)
    tl.store(sorted_expert_ptr + results + position, expert.to(tl.int64), mask=mask)


@triton.jit
def list_tiles_kernel(
    offset_ptr, expert_ptr, start_ptr, end_ptr, P, num_experts, G,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Tiles of one group of pairs: an expert, or the dropped ones (behind all experts), which also marks the unused entries.
    The second grid axis is the sorting."""
    group, sorting = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offset_ptr += sorting * (num_experts + 1)
    expert_ptr += sorting * G
    start_ptr += sorting * G
    end_ptr += sorting * G
    expert = tl.arange(0, EP)
    starts = tl.load(offset_ptr + expert, mask=expert < num_experts, other=0)
    counts = tl.load(offset_ptr + expert + 1, mask=expert < num_experts, other=0) - starts
    cuts = (counts + (ROWS - 1)) // ROWS
    first = tl.load(offset_ptr + group)
    # offsets end with the number of pairs that are not dropped
    last = tl.load(offset_ptr + group + 1, mask=group < num_experts, other=P)
    mine = last - first
    ahead = (counts > mine) | ((counts == mine) & (expert < group)) | (group == num_experts)
    before = tl.sum(tl.where(ahead & (expert < num_experts), cuts, 0), 0)
    tiles = (mine + (ROWS - 1)) // ROWS
    for nth in range(0, tiles, BLOCK):
        tile = nth + tl.arange(0, BLOCK)
        used = tile < tiles
        begin = first + tile.to(tl.int64) * ROWS
        tl.store(expert_ptr + before + tile, (tile * 0 + group).to(tl.int32), mask=used)
        tl.store(start_ptr + before + tile, begin, mask=used)
        tl.store(end_ptr + before + tile, tl.minimum(begin + ROWS, last), mask=used)
    if group == num_experts:
        for entry in range(before + tiles, G, BLOCK):
            unused = entry + tl.arange(0, BLOCK)
            nothing = tl.zeros((BLOCK,), dtype=tl.int64)
            tl.store(expert_ptr + unused, (nothing - 1).to(tl.int32), mask=unused < G)
            tl.store(start_ptr + unused, nothing, mask=unused < G)
            tl.store(end_ptr + unused, nothing, mask=unused < G)


@triton.jit
def _first_token(expert_ptr, start_ptr, sorted_token_ptr, tile, G, num_experts, num_tokens):
    """First token of tiles; rows of dropped pairs behind those of experts, unused entries last."""
    expert = tl.load(expert_ptr + tile, mask=tile < G, other=-1)
    start = tl.load(start_ptr + tile, mask=expert >= 0, other=0)
    token = tl.load(sorted_token_ptr + start, mask=(expert >= 0) & (expert < num_experts), other=0)
    token = tl.where(expert == num_experts, num_tokens, token)
    return tl.where(expert < 0, num_tokens + 1, token)


@triton.jit
def order_tiles_kernel(
    expert_ptr, start_ptr, end_ptr, sorted_token_ptr, to_expert_ptr, to_start_ptr, to_end_ptr,
    G, num_experts, num_tokens, TILES: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Some tiles, moved to their places in the order of first tokens."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    token = _first_token(expert_ptr, start_ptr, sorted_token_ptr, tile, G, num_experts, num_tokens)
    place = tl.zeros((TILES,), dtype=tl.int32)
    for first in range(0, G, OTHERS):
        other = first + tl.arange(0, OTHERS)
        theirs = _first_token(expert_ptr, start_ptr, sorted_token_ptr, other, G, num_experts, num_tokens)
        equal = (theirs[None, :] == token[:, None]) & (other[None, :] < tile[:, None])
        earlier = ((theirs[None, :] < token[:, None]) | equal) & (other < G)[None, :]
        place += tl.sum(earlier.to(tl.int32), 1)
    used = tile < G
    tl.store(to_expert_ptr + place, tl.load(expert_ptr + tile, mask=used), mask=used)
    tl.store(to_start_ptr + place, tl.load(start_ptr + tile, mask=used), mask=used)
    tl.store(to_end_ptr + place, tl.load(end_ptr + tile, mask=used), mask=used)


@on_its_device
def sort_pairs(expert_P: Tensor, token_P: Tensor | None, slots: int, num_experts: int) -> list[dict[str, Tensor]]:
    """Sort pairs by expert in three launches; those of a table also slot by slot, in the same launches.

    Args:
        expert_P: [P] int64 experts in [0, E], E = dropped.
        token_P: [P] int64 tokens of free pairs; None for a table.
        slots: K of a table; 1 for free pairs.
        num_experts: E, at most `plan.MAX_EXPERTS`.

    Returns:
        The fields of `RoutePlan` that follow from the order (counts_E, offsets_E1, order_P, inverse_P, sorted_token_P and
        sorted_expert_P), of all pairs and then of the T pairs of each slot, where there are two slots or more.
    """
    P, EP = expert_P.shape[0], triton.next_power_of_2(num_experts + 1)
    blocks, sortings, T = triton.cdiv(P, BLOCK), 1 if slots == 1 else 1 + slots, P // slots
    new = expert_P.new_empty
    counts, totals = new(sortings, blocks, EP, dtype=torch.int32), new(sortings, num_experts)
    offsets = new(sortings, num_experts + 1)
    places = [new(P if sortings == 1 else 2 * P) for _ in range(4)]
    if blocks:
        count_pairs_kernel[(blocks, sortings)](expert_P, counts, P, slots, BLOCK=BLOCK, EP=EP)
    rows = max(1, min(triton.next_power_of_2(max(1, blocks)), _SCANNED // EP))
    scan_counts_kernel[(sortings,)](counts, totals, offsets, blocks, num_experts, ROWS=rows, EP=EP, num_warps=8)
    if blocks:
        place_pairs_kernel[(blocks, sortings)](
            expert_P, expert_P if token_P is None else token_P, counts, offsets, *places,
            P, slots, num_experts, TABLE=token_P is None, BLOCK=BLOCK, OTHERS=_COMPARED, EP=EP,
        )  # fmt: skip
    names = ("counts_E", "offsets_E1", "order_P", "inverse_P", "sorted_token_P", "sorted_expert_P")
    ends = [slice(0, P), *(slice(P + k * T, P + (k + 1) * T) for k in range(sortings - 1))]
    return [
        dict(zip(names, (totals[i], offsets[i], *(place[end] for place in places)), strict=True))
        for i, end in enumerate(ends)
    ]


@on_its_device
def list_tiles(
    offsets_SE1: Tensor, num_pairs: int, rows: int, length: int, by_token: tuple[Tensor, int] | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """List the tiles of one or several sortings of as many pairs in one launch; of one by token in two.

    Args:
        offsets_SE1: [S, E + 1] int64 first sorted position of each expert, in S sortings.
        num_pairs: pairs of each sorting.
        rows: BM.
        length: G, at least the number of tiles.
        by_token: (sorted_token_P, T) to order the tiles of a single sorting by their first token; None leaves them by expert.

    Returns:
        Experts int32, starts and ends int64, [G] each, of every sorting; unused entries, which are last, are -1, 0 and 0.
    """
    S, E = offsets_SE1.shape[0], offsets_SE1.shape[1] - 1
    new = offsets_SE1.new_empty
    listed = new(S, length, dtype=torch.int32), new(S, length), new(S, length)
    list_tiles_kernel[(E + 1, S)](
        offsets_SE1, *listed, num_pairs, E, length, ROWS=rows, BLOCK=64, EP=triton.next_power_of_2(E + 1)
    )
    if by_token is None or not length:
        return list(zip(*listed, strict=True))
    sorted_token_P, num_tokens = by_token
    ordered = new(length, dtype=torch.int32), new(length), new(length)
    order_tiles_kernel[(triton.cdiv(length, _TILES),)](
        *listed, sorted_token_P, *ordered, length, E, num_tokens, TILES=_TILES, OTHERS=_OTHERS
    )
    return [ordered]
