"""Tile and chunk sizes that follow an operand, from static sizes only; shared by launchers, ahead-of-time check and roofline."""

LEAST_CHUNK = 512
"""Rows below which a part's trip through the workspace would cost more than it balances."""


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least n (1 for n below 1)."""
    return 1 << max(0, n - 1).bit_length()


def chunk_rows(num_pairs: int, tiles: int, workers: int) -> int:
    """Return the most rows a program of a weight gradient sums.

    Args:
        num_pairs: P.
        tiles: Programs an expert has without a split.
        workers: Programs that run at once.

    Returns:
        P where the tiles fill the device, else about half of what every worker would get: a power of two.
    """
    if tiles >= workers:
        return max(1, num_pairs)
    return max(LEAST_CHUNK, next_power_of_2(-(-num_pairs * tiles // (2 * workers))))


def product_tile(config: dict[str, int], O: int) -> dict[str, int]:
    """Return `config` with a column tile no wider than the result: a down projection has few columns.

    Args:
        config: BN and the rest, from `tuning`.
        O: Width of the result.

    Returns:
        A copy; BN is a power of two, at least 16.
    """
    return {**config, "BN": min(config["BN"], max(16, next_power_of_2(O)))}


def gram_tile(config: dict[str, int], O: int, D: int) -> dict[str, int]:
    """Return `config` with tiles no wider than the gradient: a low-rank factor has one narrow side.

    Args:
        config: BO, BD and the rest, from `tuning`.
        O: Width of dz.
        D: Width of x.

    Returns:
        A copy; sides are powers of two, at least 16, the least that a matrix instruction takes.
    """
    sides = {side: min(config[side], max(16, next_power_of_2(width))) for side, width in (("BO", O), ("BD", D))}
    # a narrow tile has little for eight warps to share
    warps = 4 if sides["BO"] * sides["BD"] <= 128 * 32 else config["num_warps"]
    return {**config, **sides, "num_warps": warps}


def split_block(O: int, D: int) -> tuple[int, int]:
    """Return BO and BD of `split_sum_kernel`: 512 elements, one 128-bit load a thread and part.

    Args:
        O: Rows of the gradient.
        D: Its columns.

    Returns:
        Two powers of two.
    """
    block_d = min(128, next_power_of_2(D))
    return min(512 // block_d, next_power_of_2(O)), block_d
