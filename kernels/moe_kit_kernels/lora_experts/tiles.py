"""Tile sizes of the LoRA kernels, from static sizes only; shared by the launchers, the ahead-of-time check and the roofline.

A column block holds EB experts of LP = next power of two of the rank. Its width EB * LP is at least 16 (the least that
a matrix instruction takes) and at most 128 unless one expert's rank is wider.

Legend: T tokens, K slots a token, E experts, O width out, L rank, BM x BN x BK tiles.
"""

from moe_kit_kernels.grouped_mm.sizes import next_power_of_2

L2_BYTES = 16 << 20
"""Bytes that the sorted order may keep in L2 of something it comes back to: with as much of the base passing by, an A100's
40 MB still hold it."""
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


def down_tile(num_tokens: int, num_experts: int, rank: int) -> dict[str, int]:
    """Choose the tile of the dense down kernel, so that its accumulator stays in registers.

    A taller tile reads A fewer times from L2, which bounds wide banks; it needs enough tokens to fill a GPU.

    Args:
        num_tokens: T.
        num_experts: E.
        rank: L.

    Returns:
        BM, BK, num_warps, num_stages.
    """
    EB, LP = column_block(num_experts, rank)
    if EB * LP > 128:
        return {"BM": 32, "BK": 64, "num_warps": 4, "num_stages": 3}
    tall = -(-num_tokens // 128) * -(-num_experts // EB) >= _FILLS
    return {"BM": 128 if tall else 64, "BK": 64, "num_warps": 8 if tall else 4, "num_stages": 3}


def up_tile(num_tokens: int, width: int, slots: int, *, linear: bool, capability: int) -> dict[str, int]:
    """Choose the tile of the dense up kernel.

    A taller tile reads B fewer times from L2. Its registers hold it for two slots, with the base product inside only where
    accumulators live outside of them, from compute capability 10.0 on.

    Args:
        num_tokens: T.
        width: O.
        slots: K.
        linear: The base product is inside.
        capability: Compute capability times ten.

    Returns:
        BM, BN, BK, num_warps, num_stages.
    """
    roomy = capability >= 100
    # rows that are not 16-byte aligned keep one address an element in registers
    filled = width % 16 == 0 and -(-num_tokens // 128) * -(-width // 128) >= _FILLS
    tall = roomy if linear else filled and (roomy or slots <= 2)
    return {"BM": 128 if tall else 64, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


def sorted_tile(rows: int, rank: int) -> dict[str, int]:
    """Choose the tile of the sorted up kernel.

    Args:
        rows: BM, which follows the mean number of tokens an expert.
        rank: L; wide ranks get wide tiles, which read H fewer times.

    Returns:
        BN, BL, num_warps, num_stages.
    """
    BL = rank_block(rank)
    wide = BL >= 32
    warps = 8 if rows >= 64 else 4 if wide else 2
    return {"BN": 128 if wide else 64, "BL": BL, "num_warps": warps, "num_stages": 2}


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


def up_columns(num_experts: int, rank: int) -> tuple[int, int]:
    """Size the column block of the dense up kernel, which may cut an expert.

    Args:
        num_experts: E.
        rank: L.

    Returns:
        BC, 16 to 64 (narrow ranks keep more pointers alive and get 32), and LP.
    """
    LP = next_power_of_2(rank)
    return min(32 if LP < 32 else 64, max(16, next_power_of_2(num_experts) * LP)), LP


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
