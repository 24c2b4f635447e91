"""What designs are made of: a drawn routing, our launches with the tiles that they would take, and others' passes and GEMMs.

Legend: T tokens, K experts a token, P pairs, E experts, D width in, O width out.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from moe_kit_kernels import tuning
from moe_kit_kernels.grouped_mm import sizes
from moe_kit_kernels.roofline.grouped import Runs, gram_cost, product_cost
from moe_kit_kernels.roofline.model import Cost, Device
from moe_kit_kernels.route_plan import tile_height

Designs = dict[str, list[Cost]]
S = 2
"""Bytes of a bfloat16."""
_WORKERS = {"H100": 132, "A100": 108}
CAPABILITY = {"H100": 90, "A100": 80}
"""Compute capability times ten, on which some tiles depend."""


@dataclass(frozen=True)
class Routed:
    """A uniform routing, in every order that a count walks it."""

    tokens: Runs
    """For every expert, the tokens of its rows."""
    positions: Runs
    """For every expert, the sorted positions of its rows."""
    slots: list[Runs]
    """For every slot, for every expert, the tokens of its rows."""


# the same routing serves every device, direction and design
@lru_cache(maxsize=16)
def routed(T: int, K: int, E: int, seed: int = 0) -> Routed:
    """Draw a uniform routing with K distinct experts a token.

    Args:
        T: Tokens.
        K: Experts a token.
        E: Experts.
        seed: Of the draw.

    Returns:
        The routing in its orders.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(T, E, generator=generator).topk(K).indices

    def runs(ids_P: torch.Tensor, slots: int) -> Runs:
        counts = torch.bincount(ids_P, minlength=E).tolist()
        return [run.tolist() for run in (ids_P.sort(stable=True).indices // slots).split(counts)]

    counts = torch.bincount(ids_TK.reshape(-1), minlength=E).tolist()
    positions = [run.tolist() for run in torch.arange(T * K).split(counts)]
    return Routed(runs(ids_TK.reshape(-1), K), positions, [runs(ids_TK[:, k], 1) for k in range(K)])


def _limit(device: Device) -> int:
    # the A100 has less shared memory, by which the tables know its family
    return tuning.SHARED_LIMIT["sm_90" if device.flops > 400e12 else "sm_80"]


def _tile(kernel: str, device: Device, D: int, O: int, rows: int, gated: bool = False) -> dict[str, int]:
    limit = _limit(device)
    return tuning.fit(tuning.find(kernel, "default", limit, D, O, rows, gated), rows, S, gated, limit)


def product(device: Device, runs: Runs, D: int, O: int, rows: int, kernel: str = "grouped_mm", **more) -> Cost:
    """Count a grouped product with the tile that a launch would take; `more` as in `product_cost`."""
    tile = sizes.product_tile(_tile(kernel, device, D, O, rows, bool(more.get("gated"))), O)
    return product_cost(runs, D, O, rows=rows, BN=tile["BN"], group=tile["GROUP"], cache=device.cache, **more)


def gram(device: Device, runs_z: Runs, runs_x: Runs, O: int, D: int) -> Cost:
    """Count a weight gradient [E, O, D] from rows `runs_z` of dz and `runs_x` of x."""
    P, workers = sum(map(len, runs_z)), _WORKERS[device.name]
    tile = sizes.gram_tile(_tile("grouped_gram", device, D, O, tile_height(P, len(runs_z))), O, D)
    chunk = sizes.chunk_rows(P, -(-O // tile["BO"]) * -(-D // tile["BD"]), workers)
    more = {key: tile[key] for key in ("BO", "BD", "BR")}
    return gram_cost(runs_z, runs_x, O, D, **more, chunk=chunk, workers=workers, cache=device.cache)


def passes(*elements: float) -> list[Cost]:
    """Count elementwise passes, each by the bfloat16 elements that it reads and writes."""
    return [Cost(n * S, n * S, 0.0) for n in elements]


def gemm(M: int, N: int, K: int, adds: bool = False) -> Cost:
    """A library's dense GEMM: operands once from HBM, and from L2 once for each 256 x 256 block of the result."""
    result = M * N * (2 if adds else 1)
    return Cost(
        float(M * K + N * K + result) * S,
        float(M * K * -(-N // 256) + N * K * -(-M // 256) + result) * S,
        2.0 * M * N * K,
    )
