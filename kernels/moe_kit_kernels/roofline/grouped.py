"""Bytes and FLOPs of the grouped kernels, counted from their loops: products, weight gradients, sums, compaction.

L2 bytes are the floating-point elements that all programs load and store under their masks, tile by tile; indices and work
lists, below a percent, are left out. FLOPs include the empty part of a tile. A test traces the interpreter and compares.

Legend: T tokens, P pairs, E experts, D contraction width, O width out, L rank, N slots; BM x BN tiles.
"""

from collections.abc import Sequence

from moe_kit_kernels.roofline.model import H100, Cache, Cost

Runs = Sequence[Sequence[int]]


def tiles_of(runs: Runs, rows: int, by_token: bool = False) -> list[tuple[int, Sequence[int]]]:
    """Cut the rows of every expert as `route_plan.tile_map` does.

    Args:
        runs: For every expert, what each of its sorted rows reads.
        rows: BM.
        by_token: By the first row that a tile reads.

    Returns:
        (expert, rows of the tile), experts from most rows to fewest unless `by_token`.
    """
    largest_first = sorted(range(len(runs)), key=lambda expert: -len(runs[expert]))
    tiles = [(e, runs[e][start : start + rows]) for e in largest_first for start in range(0, len(runs[e]), rows)]
    return sorted(tiles, key=lambda tile: tile[1][0]) if by_token else tiles


def product_cost(
    runs: Runs,
    D: int,
    O: int,
    *,
    rows: int,
    BN: int,
    group: int,
    gated: bool = False,
    keep: bool = False,
    through: bool = False,
    rank: int = 0,
    weighed: bool = False,
    by_token: bool = False,
    itemsize: int = 2,
    cache: int = H100.cache,
) -> Cost:
    """Count one launch of `grouped_mm_kernel`, `grouped_mm_dact_kernel` or `lora_grouped_kernel`.

    Args:
        runs: For every expert, the row of x that each of its sorted rows reads (tokens with gather, positions without).
        D: Contraction width.
        O: Width of the result.
        rows: BM.
        BN: Column tile.
        group: Row tiles that share a sweep over the columns.
        gated: Two weight tiles a step, the stack has 2 O rows; with `through`, z has two halves.
        keep: Pre-activations are stored too.
        through: The step through the activation: one weight tile, z is read, dz, w h and the parts of <t, h> are written.
        rank: L of a low-rank continuation (h and B are read too), or 0.
        weighed: A float32 gate a row is read in the epilogue.
        by_token: Order of the tiles, as in `tile_map`.
        itemsize: Bytes an element.
        cache: L2 size, bytes.

    Returns:
        Its cost.
    """
    tiles = tiles_of(runs, rows, by_token)
    blocks = -(-O // BN)
    matrices = 2 if gated and not through else 1
    # elements that a row moves in the epilogue for each column
    wide = 2 if gated else 1
    moved = 2 * wide + 1 if through else 1 + (matrices if keep else 0)
    lru, l2, flops = Cache(cache), 0.0, 0.0
    for first in range(0, len(tiles), group):
        shared = tiles[first : first + group]
        # inside a group, rows are read again for every column block; they stay cached, so one touch counts their misses
        for place, (_, members) in enumerate(shared):
            for row in members:
                lru.read(("x", row), D * itemsize)
            if rank:
                lru.read(("h", first + place), len(members) * rank * itemsize)
        for column in range(blocks):
            width = min(BN, O - column * BN)
            for expert, members in shared:
                lru.read(("w", expert, column), (matrices * D + rank) * width * itemsize)
                l2 += (len(members) * (D + rank) + (matrices * D + rank) * width) * itemsize
                l2 += len(members) * width * moved * itemsize
                # float32: the gate, and one part of <t, h> a program
                l2 += len(members) * 4 * ((weighed or through) + through)
                flops += 2.0 * rows * BN * (D * matrices + rank)
    P = sum(map(len, runs))
    streamed = P * O * moved * itemsize + 4 * P * ((weighed or through) + through * blocks)
    return Cost(lru.flush() + streamed, l2, flops)


def gram_cost(
    runs_z: Runs,
    runs_x: Runs,
    O: int,
    D: int,
    *,
    BO: int,
    BD: int,
    BR: int,
    chunk: int,
    workers: int = 132,
    itemsize: int = 2,
    cache: int = H100.cache,
) -> Cost:
    """Count one launch of `grouped_gram_kernel`, with `split_sum_kernel` where experts are split.

    Args:
        runs_z: For every expert, the row of dz that each of its sorted rows reads.
        runs_x: The same for x.
        O: Width of dz.
        D: Width of x.
        BO: Tile over O.
        BD: Tile over D.
        BR: Rows a step.
        chunk: Most rows of a program.
        workers: Programs that run at once: tiles of one chunk that pass over its rows together.
        itemsize: Bytes an element.
        cache: L2 size, bytes.

    Returns:
        Its cost.
    """
    blocks_o, blocks_d = -(-O // BO), -(-D // BD)
    waves = -(-blocks_o * blocks_d // workers)
    chunks = [
        (e, a, min(a + chunk, len(run))) for e, run in enumerate(runs_z) for a in range(0, max(1, len(run)), chunk)
    ]
    parts = {e: sum(1 for other, _, _ in chunks if other == e) for e in range(len(runs_z))}
    lru, l2, flops, stored = Cache(cache), 0.0, 0.0, 0.0
    for e, start, end in sorted(chunks, key=lambda c: c[1] - c[2]):
        for _ in range(waves):
            for row in range(start, end):
                lru.read(("z", runs_z[e][row]), O * itemsize)
                lru.read(("x", runs_x[e][row]), D * itemsize)
        n = end - start
        l2 += n * (O * blocks_d + D * blocks_o) * itemsize
        flops += 2.0 * -(-n // BR) * BR * blocks_o * BO * blocks_d * BD
        stored += O * D * (4 if parts[e] > 1 else itemsize)
    # the sum reads every part once and writes the gradient
    summed = sum(O * D * (4 * n + itemsize) for n in parts.values() if n > 1)
    launches = 2 if summed else 1
    return Cost(lru.flush() + stored + summed, l2 + stored + summed, flops, launches)


def combine_cost(T: int, P: int, D: int, *, weighed: bool = True, itemsize: int = 2) -> Cost:
    """Count one launch of `combine_kernel`: every row once, every token written once, an index and a weight a pair.

    Args:
        T: Tokens.
        P: Pairs.
        D: Width.
        weighed: A float32 weight a pair is read.
        itemsize: Bytes an element.

    Returns:
        Its cost; L2 bytes count the index and weight once for each block of 1024 columns.
    """
    rows = (P + T) * D * itemsize
    each = (12 if weighed else 8) * P
    return Cost(rows + each, rows + each * -(-D // 1024), 2.0 * P * D)


def gather_cost(N: int, used: int, D: int, *, itemsize: int = 2) -> Cost:
    """Count one launch of `gather_rows_kernel`: used slots read, all slots written.

    Args:
        N: Slots.
        used: Slots that hold a token.
        D: Width.
        itemsize: Bytes an element.

    Returns:
        Its cost.
    """
    moved = float((used + N) * D * itemsize)
    return Cost(moved, moved, 0.0)


def scatter_cost(T: int, used: int, D: int, *, weighed: bool = True, itemsize: int = 2) -> Cost:
    """Count one launch of `add_rows_kernel`: the stream read and written, used slots read, a gate a token and block.

    Args:
        T: Tokens.
        used: Slots that hold a token.
        D: Width.
        weighed: A float32 gate a token is read.
        itemsize: Bytes an element.

    Returns:
        Its cost.
    """
    moved = float((2 * T + used) * D * itemsize)
    gates = 4.0 * T * weighed
    return Cost(moved + gates, moved + gates * -(-D // 1024), 2.0 * used * D)


def scatter_backward_cost(N: int, used: int, D: int, *, itemsize: int = 2) -> Cost:
    """Count one launch of `add_rows_backward_kernel` with all gradients: dy and y read, dy_N written, a gate and a dot a slot.

    Args:
        N: Slots.
        used: Slots that hold a token.
        D: Width.
        itemsize: Bytes an element.

    Returns:
        Its cost.
    """
    moved = float((2 * used + N) * D * itemsize + 8 * N)
    return Cost(moved, moved, 3.0 * used * D)
