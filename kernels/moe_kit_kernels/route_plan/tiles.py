"""Work lists of the expert kernels: which expert and which rows each program takes, largest first, in static bounds.

    tile_map    rows of every expert cut into tiles of BM rows, for products whose programs write rows
    chunk_map   rows of every expert cut into chunks of at most C rows, for sums over an expert's rows (weight gradients)

A tile or chunk never spans two experts, and no memory is padded. How many there are depends on the routing, the length of
a list does not: unused entries are -1 and come last, so a program that walks the list may stop at the first of them.

Order. A GPU hands out programs in order, as list scheduling does: whatever starts last decides when the launch ends, so
large work goes first (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969). Tiles all hold the same work but an
expert's last one; they stay together by expert, which keeps its matrix in cache, and experts go from most rows to fewest.
Where all matrices fit the cache together (low ranks), tiles go by their first token instead: a token's experts then read it
at about the same time, and x comes from memory once, not once a pair.
Chunks share nothing, so they are sorted by their own size.

Tile height: an expert's last tile is part empty, which wastes E * (BM - 1) / 2P of the work on average, so BM follows the
mean rows of an expert, P / E. Sizes only: nothing waits for the device.

Legend: P pairs, E experts, G entries of a list, BM rows of a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kit_kernels.route_plan.plan import RoutePlan, on_kernels


@dataclass(frozen=True)
class TileMap:
    """Row tiles of one plan for one tile height, by expert (from most rows to fewest, each one's in row order) or by token."""

    expert_G: Tensor
    """[G] int32 expert of each tile; E for rows of dropped pairs; -1 for unused entries, which are last."""
    start_G: Tensor
    """[G] int64 first sorted row of each tile."""
    end_G: Tensor
    """[G] int64 last sorted row + 1 of each tile."""
    rows: int
    """BM, the most rows of a tile."""

    @property
    def num_tiles(self) -> int:
        """G, a bound that depends on sizes only."""
        return self.expert_G.shape[0]


@dataclass(frozen=True)
class ChunkMap(TileMap):
    """Chunks of one plan, from most rows to fewest; an expert without rows has one chunk of none, so that it is written."""

    first_E1: Tensor
    """[E + 1] int64 first workspace slot of each expert; only experts of two or more chunks have slots."""
    slot_G: Tensor
    """[G] int64 workspace slot of each chunk; what it holds for an expert of one chunk means nothing."""
    num_slots: int
    """Slots that any routing of these sizes can need."""


def tile_bound(num_pairs: int, num_experts: int, rows: int) -> int:
    """Return the largest number of tiles any routing of these sizes can need.

    Args:
        num_pairs: P.
        num_experts: E.
        rows: BM.

    Returns:
        G = min(P, floor(P / BM) + E + 1); the last group is that of dropped pairs.
    """
    return min(num_pairs, num_pairs // rows + num_experts + 1)


def tile_height(num_pairs: int, num_experts: int) -> int:
    """Return BM, 16 to 128, from the mean number of rows of an expert.

    Args:
        num_pairs: P.
        num_experts: E.

    Returns:
        16, 32, 64 or 128.
    """
    mean = num_pairs / max(1, num_experts)
    return 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 128 else 128


def _cut(
    start_N: Tensor, end_N: Tensor, cuts_N: Tensor, rows: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut group n into `cuts_N[n]` pieces of `rows` rows: group (clamped), start and end of each entry, and which are used."""
    ends_N = cuts_N.cumsum(0)
    entry_G = torch.arange(length, device=start_N.device)
    group_G = torch.searchsorted(ends_N, entry_G, right=True)
    used_G = group_G < start_N.shape[0]
    group_G = group_G.clamp_max(start_N.shape[0] - 1)
    before_G = (ends_N - cuts_N)[group_G]
    from_G = start_N[group_G] + (entry_G - before_G) * rows
    return group_G, from_G, torch.minimum(from_G + rows, end_N[group_G]), used_G


def tile_map(plan: RoutePlan, rows: int, *, by_token: bool = False) -> TileMap:
    """Build the tiles of a plan with a few small operations on the device; kept on the plan.

    Args:
        plan: The routing.
        rows: BM, at least 1.
        by_token: Order by the first token of a tile instead of by expert; equals by expert.

    Returns:
        The map. Dropped pairs form one more group, E, behind the experts, so that their rows get written too.

    Example:
        >>> from moe_kit_kernels import route_plan
        >>> tiles = tile_map(route_plan(torch.tensor([[0], [2], [2], [2], [-1]]), 3), 2)
        >>> tiles.expert_G.tolist(), tiles.start_G.tolist()[:4]
        ([2, 2, 0, 3, -1], [1, 3, 0, 4])
    """
    kept = plan.__dict__.setdefault("_tile_maps", {})
    if (rows, by_token) not in kept and on_kernels(plan):
        from moe_kit_kernels.route_plan.triton import list_tiles

        length = tile_bound(plan.num_pairs, plan.num_experts, rows)
        order = (plan.sorted_token_P, plan.num_tokens) if by_token else None
        (tables,) = list_tiles(plan.offsets_E1[None], plan.num_pairs, rows, length, order)
        kept[rows, by_token] = TileMap(*tables, rows)
    if (rows, by_token) not in kept:
        order_E = torch.sort(plan.counts_E, descending=True, stable=True).indices
        order_N = torch.cat([order_E, order_E.new_full((1,), plan.num_experts)])
        start_N = plan.offsets_E1[order_N]
        end_E1 = torch.cat([plan.offsets_E1[1:], order_E.new_full((1,), plan.num_pairs)])
        end_N = end_E1[order_N]
        length = tile_bound(plan.num_pairs, plan.num_experts, rows)
        group_G, start_G, end_G, used_G = _cut(start_N, end_N, (end_N - start_N + (rows - 1)) // rows, rows, length)
        expert_G = torch.where(used_G, order_N[group_G], -1)
        if by_token and length:
            token_G = plan.sorted_token_P[start_G.clamp(max=plan.num_pairs - 1)]
            # rows of dropped pairs behind those of experts, unused entries last
            token_G = torch.where(expert_G == plan.num_experts, plan.num_tokens, token_G)
            by_G = torch.sort(torch.where(used_G, token_G, plan.num_tokens + 1), stable=True).indices
            expert_G, start_G, end_G = expert_G[by_G], start_G[by_G], end_G[by_G]
        kept[rows, by_token] = TileMap(expert_G.to(torch.int32), start_G, end_G, rows)
    return kept[rows, by_token]


def slot_tile_maps(plan: RoutePlan, rows: int) -> list[tuple[RoutePlan, TileMap]]:
    """Build the tiles of a table's slots, by expert; on a GPU in one launch for all of them.

    Args:
        plan: The routing, from a [T, K] table.
        rows: BM, at least 1.

    Returns:
        The plan and the map of each slot.
    """
    parts = plan.slot_plans
    if len(parts) > 1 and on_kernels(plan) and (rows, False) not in parts[0].__dict__.get("_tile_maps", {}):
        from moe_kit_kernels.route_plan.triton import list_tiles

        T, E = plan.num_tokens, plan.num_experts
        # the slots' offsets are neighbours in memory
        offsets = parts[0].offsets_E1
        offsets_KE1 = offsets.as_strided((len(parts), E + 1), (E + 1, 1), offsets.storage_offset())
        for part, tables in zip(parts, list_tiles(offsets_KE1, T, rows, tile_bound(T, E, rows)), strict=True):
            part.__dict__.setdefault("_tile_maps", {})[rows, False] = TileMap(*tables, rows)
    return [(part, tile_map(part, rows)) for part in parts]


def chunk_map(plan: RoutePlan, rows: int) -> ChunkMap:
    """Build the chunks of a plan's experts with a few small operations on the device; kept on the plan.

    Args:
        plan: The routing.
        rows: Most rows of a chunk, at least 1; P or more keeps every expert whole.

    Returns:
        The map, largest chunk first, equals by expert and row. Dropped pairs have no chunk.

    Example:
        >>> from moe_kit_kernels import route_plan
        >>> chunks = chunk_map(route_plan(torch.tensor([[0], [2], [2], [2], [-1]]), 3), 2)
        >>> chunks.expert_G.tolist(), (chunks.end_G - chunks.start_G).tolist()[:4], chunks.first_E1.tolist()
        ([2, 0, 2, 1, -1], [2, 1, 1, 0], [0, 0, 0, 2])
    """
    kept = plan.__dict__.setdefault("_chunk_maps", {})
    if rows not in kept:
        P, E = plan.num_pairs, plan.num_experts
        start_E, end_E = plan.offsets_E1[:-1], plan.offsets_E1[1:]
        cuts_E = ((end_E - start_E + (rows - 1)) // rows).clamp_min(1)
        group_G, start_G, end_G, used_G = _cut(start_E, end_E, cuts_E, rows, E + P // rows)
        first_E1 = torch.zeros_like(plan.offsets_E1)
        torch.cumsum(torch.where(cuts_E > 1, cuts_E, 0), 0, out=first_E1[1:])
        slot_G = first_E1[group_G] + (start_G - start_E[group_G]) // rows
        expert_G = torch.where(used_G, group_G, -1).to(torch.int32)
        order_G = torch.sort(torch.where(used_G, end_G - start_G, -1), descending=True, stable=True).indices
        # an expert with two or more chunks has more than `rows` rows, so fewer than P / rows experts round up
        slots = 2 * (P // rows)
        kept[rows] = ChunkMap(
            expert_G[order_G], start_G[order_G], end_G[order_G], rows, first_E1, slot_G[order_G], slots
        )
    return kept[rows]
