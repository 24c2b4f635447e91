"""The tile map of the grouped kernels: which expert and which rows each row tile multiplies, in static bounds.

The rows of every expert are cut into tiles of BM rows; a tile never spans two experts, and no memory is padded. Dropped
pairs form one more group behind the last expert, so that their rows get written too. The number of tiles depends on the
routing, the map's length does not: at most floor(P / BM) + (E + 1), and never more than P; unused entries are -1.

Tile height: an expert's last tile is part empty, which wastes E * (BM - 1) / 2P of the work on average, so BM follows the
mean rows of an expert, P / E. Sizes only: nothing waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kit_kernels.route_plan import RoutePlan


@dataclass(frozen=True)
class TileMap:
    """Row tiles of one plan for one tile height."""

    expert_G: Tensor
    """[G] int32 expert of each tile; E for rows of dropped pairs; -1 for unused entries."""
    start_G: Tensor
    """[G] int64 first sorted row of each tile."""
    end_G: Tensor
    """[G] int64 last row + 1 of the tile's group."""
    rows: int
    """BM."""

    @property
    def num_tiles(self) -> int:
        """G, a bound that depends on sizes only."""
        return self.expert_G.shape[0]


def tile_bound(num_pairs: int, num_experts: int, rows: int) -> int:
    """Return the largest number of tiles any routing of these sizes can need."""
    return min(num_pairs, num_pairs // rows + num_experts + 1)


def tile_height(num_pairs: int, num_experts: int) -> int:
    """Return BM, 16 to 128, from the mean number of rows of an expert."""
    mean = num_pairs / max(1, num_experts)
    return 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 128 else 128


def tile_map(plan: RoutePlan, rows: int) -> TileMap:
    """Build the map with a few small operations on the device.

    Args:
        plan: The routing.
        rows: BM.

    Returns:
        The map; groups in ascending order of experts.
    """
    G = tile_bound(plan.num_pairs, plan.num_experts, rows)
    start_E1 = plan.offsets_E1
    end_E1 = torch.cat([start_E1[1:], start_E1.new_full((1,), plan.num_pairs)])
    tiles_end_E1 = ((end_E1 - start_E1 + (rows - 1)) // rows).cumsum(0)
    tile_G = torch.arange(G, device=plan.device)
    group_G = torch.searchsorted(tiles_end_E1, tile_G, right=True)
    used_G = group_G <= plan.num_experts
    group_G = group_G.clamp_max(plan.num_experts)
    tiles_before_G = torch.where(group_G > 0, tiles_end_E1[(group_G - 1).clamp_min(0)], 0)
    start_G = start_E1[group_G] + (tile_G - tiles_before_G) * rows
    expert_G = torch.where(used_G, group_G, -1).to(torch.int32)
    return TileMap(expert_G, start_G, end_E1[group_G], rows)
