"""Bytes and FLOPs of the LoRA kernels on a dense base, counted from their loops; see `grouped` for what is counted.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank, s bytes an element.
"""

from collections.abc import Sequence

from moe_kit_kernels.roofline.grouped import Runs, tiles_of
from moe_kit_kernels.roofline.model import H100, Cache, Cost


def _tiles(T: int, rows: int) -> list[int]:
    return [min(rows, T - start) for start in range(0, T, rows)]


def down_dense_cost(
    T: int,
    P: int,
    D: int,
    E: int,
    L: int,
    *,
    BM: int,
    EB: int,
    LP: int,
    slots: int,
    backward: bool = False,
    itemsize: int = 2,
    cache: int = H100.cache,
) -> Cost:
    """Count one launch of `lora_down_dense_kernel`.

    Args:
        T: Tokens.
        P: Pairs that are not dropped.
        D: Width of the input (of dy in the backward).
        E: Experts.
        L: Rank.
        BM: Row tile.
        EB: Experts of a column block.
        LP: Columns of an expert, L padded.
        slots: K.
        backward: H is read, dH and the gate's gradient are written.
        itemsize: Bytes an element.
        cache: L2 size, bytes.

    Returns:
        Its cost.
    """
    blocks, lru, l2, flops = -(-E // EB), Cache(cache), 0.0, 0.0
    for tile, rows in enumerate(_tiles(T, BM)):
        for block in range(blocks):
            columns = min(EB, E - block * EB) * L
            lru.read(("x", tile), rows * D * itemsize)
            lru.read(("a", block), columns * D * itemsize)
            l2 += (rows + columns) * D * itemsize
            flops += 2.0 * BM * EB * LP * D
            if backward:
                l2 += rows * slots * 4
    # H is written; in the backward the kept H is read, and a gate's gradient is written
    stored = P * L * itemsize * (2 if backward else 1) + (4 * P if backward else 0)
    return Cost(lru.flush() + stored + (4 * T * slots if backward else 0), l2 + stored, flops)


def up_dense_cost(
    T: int,
    P: int,
    O: int,
    E: int,
    L: int,
    *,
    BM: int,
    BN: int,
    BC: int,
    LP: int,
    slots: int,
    weighed: bool = True,
    base: bool = True,
    linear: int = 0,
    itemsize: int = 2,
    cache: int = H100.cache,
) -> Cost:
    """Count one launch of `lora_up_dense_kernel`.

    Args:
        T: Tokens.
        P: Pairs that are not dropped.
        O: Width of the result.
        E: Experts.
        L: Rank.
        BM: Row tile.
        BN: Column tile.
        BC: Columns of H a step.
        LP: Columns of an expert, L padded.
        slots: K.
        weighed: Gates are read and multiply H.
        base: A base result is read and added.
        linear: D where the base product is computed inside, else 0.
        itemsize: Bytes an element.
        cache: L2 size, bytes.

    Returns:
        Its cost.
    """
    steps, lru, l2, flops = -(-E * LP // BC), Cache(cache), 0.0, 0.0
    for tile, rows in enumerate(_tiles(T, BM)):
        for column in range(-(-O // BN)):
            width = min(BN, O - column * BN)
            lru.read(("h", tile), P / T * rows * L * itemsize)
            lru.read(("b", column), E * L * width * itemsize)
            l2 += (P / T * rows * L + E * L * width + rows * width * (1 + base)) * itemsize
            if weighed:
                l2 += rows * slots * 4
            if linear:
                lru.read(("x", tile), rows * linear * itemsize)
                lru.read(("w", column), width * linear * itemsize)
                l2 += (rows + width) * linear * itemsize
            flops += 2.0 * BM * BN * (steps * BC + linear)
    streamed = T * O * (1 + base) * itemsize + 4 * T * slots * weighed
    return Cost(lru.flush() + streamed, l2, flops)


def up_sorted_cost(
    slots: Sequence[Runs],
    O: int,
    L: int,
    *,
    rows: int,
    BN: int,
    BL: int,
    width: int,
    weighed: bool = True,
    base: bool = True,
    itemsize: int = 2,
    cache: int = H100.cache,
) -> Cost:
    """Count the launches of `lora_up_sorted_kernel`: column group by column group, slot by slot.

    Args:
        slots: For every slot, for every expert, the tokens of its rows; the dropped ones of each slot not among them.
        O: Width of the result.
        L: Rank.
        rows: BM.
        BN: Column tile.
        BL: Ranks a step.
        width: Columns of a group, whose block of y stays in cache between slots.
        weighed: Gates are read and multiply H.
        base: A base result is read by the first slot.
        itemsize: Bytes an element.
        cache: L2 size, bytes.

    Returns:
        Its cost, for routings without dropped pairs.
    """
    lru, l2, flops, launches = Cache(cache), 0.0, 0.0, 0
    for first in range(0, O, width):
        columns = min(O, first + width) - first
        blocks = -(-columns // BN)
        for slot, runs in enumerate(slots):
            launches += 1
            # the first slot reads the base, if any, and later ones what is there
            reads_y = base or slot > 0
            for expert, members in tiles_of(runs, rows):
                lru.read(("b", expert, first), L * columns * itemsize)
                for token in members:
                    lru.read(("h", token, slot), L * itemsize)
                    if slot == 0 and base:
                        lru.read(("base", token, first), columns * itemsize)
                    if slot > 0:
                        lru.read(("y", token, first), columns * itemsize)
                    lru.write(("y", token, first), columns * itemsize)
                n = len(members)
                l2 += (n * L * blocks + L * columns + n * columns * (1 + reads_y)) * itemsize + 4 * n * blocks * weighed
                flops += 2.0 * rows * BN * blocks * -(-L // BL) * BL
    P = sum(len(run) for runs in slots for run in runs)
    return Cost(lru.flush() + 4 * P * weighed, l2, flops, launches)
