"""`route_plan`: from chosen expert ids to everything an expert kernel asks about the routing."""

from moe_kit_kernels.route_plan.plan import (
    RoutePlan,
    check_bounds,
    check_ids,
    check_plan_device,
    route_plan,
    route_plan_pairs,
)
from moe_kit_kernels.route_plan.tiles import ChunkMap, TileMap, chunk_map, slot_tile_maps, tile_height, tile_map

__all__ = [
    "ChunkMap",
    "RoutePlan",
    "TileMap",
    "check_bounds",
    "check_ids",
    "check_plan_device",
    "chunk_map",
    "route_plan",
    "route_plan_pairs",
    "slot_tile_maps",
    "tile_height",
    "tile_map",
]
