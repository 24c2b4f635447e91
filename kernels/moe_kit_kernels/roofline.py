"""Roofline model of the grouped kernels: bytes and FLOPs of the kernels as written, and the time they bound.

    time = max(HBM bytes / HBM bandwidth, L2 bytes / L2 bandwidth, FLOPs / peak)

L2 bytes are what the loops load and store, counted tile by tile (a test traces the interpreter and compares). HBM bytes are
those that miss an LRU cache of the L2's size, walked in the kernel's real tile order; rows of x are single entries, so a
token that several experts read hits while it is still there. FLOPs include the empty part of an expert's last tile. The
devices' figures are achieved rates assumed for a well-tuned kernel, not measurements of this one.

Legend: T tokens, K experts a token, P = T K pairs, E experts, D width, H expert width.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from moe_kit_kernels.route_plan import tile_height


@dataclass(frozen=True)
class Device:
    """Rates of one GPU, per second and in bytes."""

    name: str
    """Name in tables."""
    flops: float
    """Achieved dense bf16 FLOP/s."""
    hbm: float
    """Achieved HBM byte/s."""
    l2: float
    """Achieved L2 byte/s."""
    cache: int
    """L2 size, bytes."""


H100 = Device("H100", 650e12, 2.8e12, 5.5e12, 50_000_000)
A100 = Device("A100", 250e12, 1.7e12, 4.0e12, 40_000_000)


@dataclass(frozen=True)
class Cost:
    """Work of one kernel or of several in a row."""

    hbm_bytes: float
    """Bytes from and to HBM."""
    l2_bytes: float
    """Bytes that the programs load and store."""
    flops: float
    """Floating-point operations, padding of tiles included."""
    launches: int = 1
    """Kernel launches."""

    def seconds(self, device: Device) -> float:
        """Return the modelled time of one kernel: its slowest resource."""
        return max(self.hbm_bytes / device.hbm, self.l2_bytes / device.l2, self.flops / device.flops)


class Cache:
    """An LRU cache of entries with sizes; `touch` counts the bytes of misses."""

    def __init__(self, size: int):
        self.size, self.used, self.missed = size, 0, 0
        self.entries: OrderedDict[Hashable, int] = OrderedDict()

    def touch(self, key: Hashable, size: int) -> None:
        """Read one entry; a miss loads it and evicts the oldest.

        Args:
            key: What is read.
            size: Its bytes.
        """
        if key in self.entries:
            self.entries.move_to_end(key)
            return
        self.missed += size
        self.entries[key] = size
        self.used += size
        while self.used > self.size:
            _, freed = self.entries.popitem(last=False)
            self.used -= freed


def product_cost(
    runs: Sequence[Sequence[int]],
    D: int,
    O: int,
    *,
    rows: int,
    BN: int,
    group: int,
    gated: bool = False,
    keep: bool = False,
    itemsize: int = 2,
    cache: int = H100.cache,
) -> Cost:
    """Count one launch of `grouped_mm_kernel`.

    Args:
        runs: For every expert, the row of x that each of its sorted rows reads (tokens with gather, positions without).
        D: Contraction width.
        O: Width of the result.
        rows: BM.
        BN: Column tile.
        group: Row tiles that share a sweep over the columns.
        gated: Two weight tiles a step; the stack has 2 O rows.
        keep: Pre-activations are stored too.
        itemsize: Bytes an element.
        cache: L2 size, bytes.

    Returns:
        Its cost; index and tile-map reads, below a percent, are left out.
    """
    largest_first = sorted(range(len(runs)), key=lambda expert: -len(runs[expert]))
    tiles = [
        (expert, runs[expert][start : start + rows])
        for expert in largest_first
        for start in range(0, len(runs[expert]), rows)
    ]
    blocks = -(-O // BN)
    matrices = 2 if gated else 1
    lru, l2, flops = Cache(cache), 0, 0.0
    for first in range(0, len(tiles), group):
        shared = tiles[first : first + group]
        # inside a group, rows are read again for every column block; they stay cached, so one touch counts their misses
        for _, members in shared:
            for row in members:
                lru.touch(("x", row), D * itemsize)
        for column in range(blocks):
            width = min(BN, O - column * BN)
            for expert, members in shared:
                lru.touch(("w", expert, column), matrices * width * D * itemsize)
                stored = len(members) * width * (1 + (matrices if keep else 0))
                l2 += (len(members) * D + matrices * width * D + stored) * itemsize
                flops += 2.0 * rows * BN * D * matrices
    stored = sum(map(len, runs)) * O * (1 + (matrices if keep else 0)) * itemsize
    return Cost(lru.missed + stored, l2, flops)


def combine_cost(T: int, P: int, D: int, *, itemsize: int = 2) -> Cost:
    """Count one launch of `combine_kernel`: every row once, every token written once, an index and a weight a pair.

    Args:
        T: Tokens.
        P: Pairs.
        D: Width.
        itemsize: Bytes an element.

    Returns:
        Its cost; L2 bytes count the index and weight once for each block of 1024 columns.
    """
    rows = (P + T) * D * itemsize
    return Cost(rows + 12 * P, rows + 12 * P * -(-D // 1024), 2.0 * P * D)


def routed_rows(T: int, K: int, E: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Draw a uniform routing.

    Args:
        T: Tokens.
        K: Distinct experts a token.
        E: Experts.
        seed: Of the draw.

    Returns:
        For every expert, the tokens of its rows and their sorted positions.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(T, E, generator=generator).topk(K).indices.reshape(-1)
    order = ids.sort(stable=True).indices
    counts = torch.bincount(ids, minlength=E).tolist()
    tokens = [run.tolist() for run in (order // K).split(counts)]
    positions = [run.tolist() for run in torch.arange(T * K).split(counts)]
    return tokens, positions


def block_costs(
    T: int, K: int, E: int, D: int, H: int, *, device: Device = H100, keep: bool = True, itemsize: int = 2
) -> dict[str, list[Cost]]:
    """Count the forward of one SwiGLU block in our kernels and in the designs of others.

    Args:
        T: Tokens.
        K: Experts a token.
        E: Experts.
        D: Width.
        H: Expert width.
        device: For the size of its L2.
        keep: Training: pre-activations are stored.
        itemsize: Bytes an element.

    Returns:
        Design -> its kernels in order. "minimum" reads x and the stacks once and writes y once.
    """
    from moe_kit_kernels import tuning

    P, S = T * K, itemsize
    tokens, positions = routed_rows(T, K, E)
    rows = tile_height(P, E)
    # the A100 has less shared memory, by which the tables know its family
    limit = tuning.SHARED_LIMIT["sm_90" if device.flops > 400e12 else "sm_80"]
    config, gated = (
        tuning.fit(tuning.find("grouped_mm", "default", limit, D, H, rows, g), rows, S, g, limit) for g in (False, True)
    )
    common = {"rows": rows, "cache": device.cache, "itemsize": S}
    ours = [
        product_cost(tokens, D, H, BN=gated["BN"], group=gated["GROUP"], gated=True, keep=keep, **common),
        product_cost(positions, H, D, BN=config["BN"], group=config["GROUP"], **common),
        combine_cost(T, P, D, itemsize=S),
    ]
    flops_up, flops_down = 4.0 * P * D * H, 2.0 * P * D * H
    weights = 3 * E * D * H * S
    minimum = [Cost((2 * T * D) * S + weights, (2 * T * D) * S + weights, flops_up + flops_down)]

    def passes(*elements: int) -> list[Cost]:
        return [Cost(n * S, n * S, 0.0) for n in elements]

    up = product_cost(positions, D, 2 * H, BN=config["BN"], group=config["GROUP"], **common)
    sort_scatter = [
        *passes(2 * P * D),
        up,
        # silu of one half, product with the other
        *passes(2 * P * H, 3 * P * H),
        ours[1],
        # weights, inverse permutation, sum over slots
        *passes(2 * P * D, 2 * P * D, P * D + T * D),
    ]
    loop = [replace(cost, launches=E) for cost in sort_scatter]
    masked = [
        Cost((T * D + 2 * T * H + 2 * D * H) * S, (T * D + 2 * T * H + 2 * D * H) * S, 4.0 * T * D * H)
        for _ in range(E)
    ]
    masked += [
        Cost((T * H + 2 * T * D + D * H) * S, (T * H + 2 * T * D + D * H) * S, 2.0 * T * D * H) for _ in range(E)
    ]
    copied = 3 * P * D * H * S
    return {
        "minimum": minimum,
        "moe_kit": ours,
        "sort + scatter + combine": sort_scatter,
        "loop over experts": loop,
        "masked GEMMs": masked,
        "gathered bmm": [Cost(3.0 * copied, 3.0 * copied, flops_up + flops_down)],
    }


def seconds(kernels: Iterable[Cost], device: Device, launch: float = 6e-6) -> float:
    """Return the modelled time of kernels in a row; launches beyond the first of a kernel cost `launch` seconds each.

    Args:
        kernels: Costs in order.
        device: Rates.
        launch: Seconds a launch that nothing hides.

    Returns:
        Seconds.
    """
    return sum(max(kernel.seconds(device), (kernel.launches - 1) * launch) for kernel in kernels)
