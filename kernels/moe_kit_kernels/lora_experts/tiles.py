"""Tile sizes of the LoRA kernels, from static sizes only; shared by the launchers, the ahead-of-time check and the roofline.

A column block holds EB experts of LP = next power of two of the rank. Its width EB * LP is at least 16 (the least that
a matrix instruction takes) and at most 128 unless one expert's rank is wider.

Sizes here are defaults: `tuned` asks the device's table and the pins of `moe_kit_kernels.tuning` first. Products of float32
operands run on the plain units, which take whole inner tiles into registers: those tiles are 16 deep.

Legend: T tokens, K slots a token, E experts, O width out, L rank, BM x BN x BK tiles.
"""

import torch

from moe_kit_kernels import tuning
from moe_kit_kernels.grouped_mm.sizes import next_power_of_2
from moe_kit_kernels.route_plan import tile_height

L2_BYTES = 16 << 20
"""Bytes that the sorted order may keep in L2 of something it comes back to: with as much of the base passing by, an A100's
40 MB still hold it."""
WIDE_BANK = 256
"""Columns E * LP from which the dense up kernel is bound by what L2 moves of B."""
# programs that fill the GPUs of interest once
_FILLS = 128


def column_block(num_experts: int, rank: int) -> tuple[int, int]:
    """Size a column block.

    Args:
        num_experts: E.
        rank: L.

    Returns:
        EB and LP, powers of two with 16 <= EB * LP.
    """
    LP = next_power_of_2(rank)
    EB = min(next_power_of_2(num_experts), max(1, 128 // LP))
    return max(EB, 16 // LP), LP


def down_tile(num_tokens: int, num_experts: int, rank: int, itemsize: int = 2) -> dict[str, int]:
    """Choose the tile of the dense down kernel, so that its accumulator stays in registers.

    A taller tile reads A fewer times from L2, which bounds wide banks; it needs enough tokens to fill a GPU.

    Args:
        num_tokens: T.
        num_experts: E.
        rank: L.
        itemsize: Bytes an element of the wider operand.

    Returns:
        BM, BK, num_warps, num_stages.
    """
    EB, LP = column_block(num_experts, rank)
    if itemsize > 2:
        return {"BM": 32, "BK": 16, "num_warps": 8, "num_stages": 3}
    if EB * LP > 128:
        return {"BM": 32, "BK": 64, "num_warps": 4, "num_stages": 3}
    tall = -(-num_tokens // 128) * -(-num_experts // EB) >= _FILLS
    return {"BM": 128 if tall else 64, "BK": 64, "num_warps": 8 if tall else 4, "num_stages": 3}


def up_tile(
    num_tokens: int,
    width: int,
    slots: int,
    *,
    linear: bool,
    capability: int,
    itemsize: int = 2,
    columns: int = 0,
) -> dict[str, int]:
    """Choose the tile of the dense up kernel.

    A taller tile reads B fewer times from L2. Its registers hold it for two slots, with the base product inside only where
    accumulators live outside of them: in the tensor memory of compute capability 10 and 11, which 12 does not have. A bank of many
    columns, whose B is what L2 moves most, gets the tallest tile on capability 9, where L2 and not memory is the limit then.

    Args:
        num_tokens: T.
        width: O.
        slots: K.
        linear: The base product is inside.
        capability: Compute capability times ten.
        itemsize: Bytes an element of the wider operand.
        columns: E * LP of the bank.

    Returns:
        BM, BN, BK, num_warps, num_stages.
    """
    if itemsize > 2:
        return {"BM": 64, "BN": 64 if linear else 128, "BK": 16, "num_warps": 8, "num_stages": 3}
    roomy = 100 <= capability < 120
    # rows that are not 16-byte aligned keep one address an element in registers
    filled = width % 16 == 0 and -(-num_tokens // 128) * -(-width // 128) >= _FILLS
    tall = roomy if linear else filled and (roomy or slots <= 2)
    if tall and not linear and 90 <= capability < 100 and columns >= WIDE_BANK and num_tokens >= 256:
        return {"BM": 256, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3}
    return {"BM": 128 if tall else 64, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


def sorted_tile(rows: int, rank: int, itemsize: int = 2) -> dict[str, int]:
    """Choose the tile of the sorted up kernel.

    Args:
        rows: BM, which follows the mean number of tokens an expert.
        rank: L; wide ranks get wide tiles, which read H fewer times.
        itemsize: Bytes an element of the wider operand.

    Returns:
        BN, BL, num_warps, num_stages.
    """
    if itemsize > 2:
        return {"BN": 64, "BL": 16, "num_warps": 8 if rows >= 64 else 4, "num_stages": 2}
    BL = rank_block(rank)
    wide = BL >= 32
    warps = 8 if rows >= 64 else 4 if wide else 2
    return {"BN": 128 if wide else 64, "BL": BL, "num_warps": warps, "num_stages": 2}


def down_rows(num_pairs: int, num_experts: int, rank: int, itemsize: int = 2) -> int:
    """Choose the tile height of the sorted down product.

    A tile reads all of its expert's A, which is rank / height of what it reads of x. Where that is much, and an expert has rows
    for many tiles, they are twice as tall as elsewhere; a narrow result leaves the registers for it.

    Args:
        num_pairs: P.
        num_experts: E.
        rank: L.
        itemsize: Bytes an element of the wider operand.

    Returns:
        16 to 256.
    """
    tall = 32 <= next_power_of_2(rank) <= 64 and num_pairs >= 4096 * num_experts and itemsize == 2
    return 256 if tall else tile_height(num_pairs, num_experts)


def by_token(num_experts: int, rank: int, width: int, itemsize: int) -> bool:
    """Choose the tile order of the sorted down product.

    Args:
        num_experts: E.
        rank: L.
        width: D.
        itemsize: Bytes an element of A.

    Returns:
        True where the whole bank stays in L2, so that x should be what is read once.
    """
    return num_experts * rank * width * itemsize <= L2_BYTES


def group_columns(num_tokens: int, itemsize: int, BN: int) -> int:
    """Size a column group of the sorted order, whose block of y stays in L2 between slots.

    Args:
        num_tokens: T.
        itemsize: Bytes an element of y.
        BN: Column tile.

    Returns:
        Columns, a multiple of BN.
    """
    return max(BN, L2_BYTES // (max(1, num_tokens) * itemsize) // BN * BN)


def up_columns(num_experts: int, rank: int, itemsize: int = 2, rows: int = 128, slots: int = 1) -> tuple[int, int]:
    """Size the column block of the dense up kernel, which may cut an expert.

    Args:
        num_experts: E.
        rank: L.
        itemsize: Bytes an element of the wider operand.
        rows: BM.
        slots: K, whose ids and weights stay in registers.

    Returns:
        BC, 16 to 64, and LP. Narrow ranks keep more pointers alive, taller tiles more rows, and many slots more ids: they get fewer
        columns, and so does a low tile of narrow ranks, for which compilers leave fewer registers.
    """
    LP = next_power_of_2(rank)
    if itemsize > 2:
        return 16, LP
    if LP < 16:
        most = 32 if rows == 128 else 16
    else:
        most = 64 if LP >= 32 and rows <= 128 and slots <= 4 else 32
    return min(most, max(16, next_power_of_2(num_experts) * LP)), LP


def rank_block(rank: int) -> int:
    """Size the block of ranks of the sorted up kernel.

    Args:
        rank: L.

    Returns:
        BL, 16 to 64.
    """
    return min(64, max(16, next_power_of_2(rank)))


def decode_tile(rank: int) -> tuple[int, int, int]:
    """Choose the tile of the decode kernels.

    Args:
        rank: L.

    Returns:
        LP, BK (4096 elements together) and BN (at least eight elements a thread: one 128-bit load).
    """
    LP = next_power_of_2(rank)
    return LP, max(16, 4096 // LP), max(64, 1024 // LP)


def tuned(
    kernel: str,
    device: torch.device,
    default: dict[str, int],
    *,
    rows: int,
    width_in: int,
    width_out: int,
    rank: int,
    itemsize: int,
    columns: int = 0,
) -> dict[str, int]:
    """Look a launch's tile up: pins and the device's table before the default of this module.

    Args:
        kernel: Key of the tables.
        device: Where it will run.
        default: Tile of this module for the call's sizes.
        rows: Bucket of the number of tokens: the height of the default tile.
        width_in: Width of the input; E * L of an up product.
        width_out: Width of the result; E * L of a down product.
        rank: L.
        itemsize: Bytes an element of the wider operand.
        columns: Columns of the tile where the configuration does not name them, as in the down product.

    Returns:
        The tile, cut down to the device's shared memory.

    Raises:
        KernelError: The pin cannot be read, or names an unknown kernel or value.
    """
    sizes = {"rows": rows, "width_in": width_in, "width_out": width_out, "rank": rank, "itemsize": itemsize}
    return tuning.lookup(kernel, device, **sizes, gated=False, default=default, columns=columns)
