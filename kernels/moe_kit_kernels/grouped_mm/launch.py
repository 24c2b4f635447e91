"""Launchers of the grouped products: tile sizes from static sizes, strides, specialisation switches.

Tile widths come from `tuning` (a JSON table by device, with a default that compiles without spills everywhere); the tile
height from `route_plan.tile_height`. Every launcher takes tensors of any width; the last dimension of row operands is made
contiguous, weights keep their strides.
"""

import torch
import triton as _triton
from torch import Tensor

from moe_kit_kernels import tuning
from moe_kit_kernels.common.device import on_its_device
from moe_kit_kernels.grouped_mm.sizes import product_tile
from moe_kit_kernels.grouped_mm.triton import grouped_mm_dact_kernel, grouped_mm_kernel
from moe_kit_kernels.route_plan import RoutePlan, TileMap, tile_height, tile_map


def precision(dtype: torch.dtype) -> str:
    """Return how fp32 products are made: TF32 where torch allows it for its own, else exact."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def plan_tiles(plan: RoutePlan, *, by_token: bool = False, rows: int = 0) -> TileMap:
    """Return the tile map of a plan for a height, or for the one that its sizes ask for, ordered as `tile_map` says."""
    return tile_map(plan, rows or tile_height(plan.num_pairs, plan.num_experts), by_token=by_token)


def unit_stride(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension: itself where it has one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(*operands: Tensor) -> bool:
    """Return whether every row of every operand starts at a multiple of 16 bytes."""
    return all(
        stride == 1 or (stride * tensor.element_size()) % 16 == 0 for tensor in operands for stride in tensor.stride()
    )


@on_its_device
def product(
    x: Tensor,
    weight_EOD: Tensor,
    plan: RoutePlan,
    tiles: TileMap,
    *,
    gather: bool = False,
    scatter: bool = False,
    bias_EO: Tensor | None = None,
    weights_P: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch `grouped_mm_kernel`.

    Args:
        x: `[T, D]` with `gather`, else `[P, D]`.
        weight_EOD: `[E, O, D]`, any strides; pass a transposed view for the gradient of x.
        plan: The routing.
        tiles: Its tile map.
        gather: As in the public operator.
        scatter: As in the public operator.
        bias_EO: As in the public operator.
        weights_P: Flat weights in the given order.
        residual: As in the public operator.
        activation: As in the public operator.
        gated: As in the public operator.
        keep: Also return the pre-activations.

    Returns:
        The result `[P, O]` (`[P, O/2]` gated) and the pre-activations `[P, O]` or None.
    """
    x = unit_stride(x)
    P, D = plan.num_pairs, weight_EOD.shape[2]
    O = weight_EOD.shape[1] // (2 if gated else 1)
    y_PO = x.new_empty(P, O)
    z_PF = x.new_empty(P, weight_EOD.shape[1]) if keep else None
    if P == 0 or O == 0:
        return y_PO, z_PF
    tile = tuning.lookup(
        "grouped_mm",
        x.device,
        width_in=D,
        width_out=O,
        rows=tiles.rows,
        gated=gated,
        itemsize=x.element_size(),
        aligned=aligned(x, weight_EOD, y_PO),
    )
    tile = product_tile(tile, O)
    grid = (tiles.num_tiles * _triton.cdiv(O, tile["BN"]),)
    grouped_mm_kernel[grid](
        x,
        weight_EOD,
        y_PO,
        z_PF if keep else y_PO,
        bias_EO.contiguous() if bias_EO is not None else x,
        weights_P.contiguous() if weights_P is not None else x,
        residual.contiguous() if residual is not None else x,
        plan.sorted_token_P,
        plan.order_P,
        tiles.expert_G,
        tiles.start_G,
        tiles.end_G,
        tiles.num_tiles,
        plan.num_experts,
        D,
        O,
        x.stride(0),
        *weight_EOD.stride(),
        O,
        GATHER=gather,
        SCATTER=scatter,
        BIAS=bias_EO is not None,
        WEIGHTS=weights_P is not None,
        RESIDUAL=residual is not None,
        ACTIVATION=activation or "",
        GATED=gated,
        KEEP=keep,
        EVEN_D=D % tile["BK"] == 0,
        PRECISION=precision(x.dtype),
        BM=tiles.rows,
        BN=tile["BN"],
        BK=tile["BK"],
        GROUP=tile["GROUP"],
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return y_PO, z_PF


@on_its_device
def through_activation(
    dy: Tensor,
    down_EDH: Tensor,
    z_PF: Tensor,
    weights_P: Tensor,
    plan: RoutePlan,
    tiles: TileMap,
    *,
    gather: bool,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `grouped_mm_dact_kernel`.

    Args:
        dy: `[T, D]` with `gather`, else `[P, D]` sorted.
        down_EDH: Second stack.
        z_PF: Saved pre-activations, sorted.
        weights_P: Flat weights in the given order.
        plan: The routing.
        tiles: Its tile map.
        gather: Whether dy is by token.
        activation: Name of the activation.
        gated: Whether z holds two halves.

    Returns:
        dz `[P, F]`, `w * h` `[P, H]`, and `<t_p, h_p>` `[P]` float32, all sorted.
    """
    dy = unit_stride(dy)
    P, (_, D, H) = plan.num_pairs, down_EDH.shape
    dz_PF = torch.empty_like(z_PF)
    wh_PH = z_PF.new_empty(P, H)
    if P == 0:
        return dz_PF, wh_PH, torch.zeros(0, dtype=torch.float32, device=dy.device)
    tile = tuning.lookup(
        "grouped_mm_dact",
        dy.device,
        width_in=D,
        width_out=H,
        rows=tiles.rows,
        gated=gated,
        itemsize=dy.element_size(),
        aligned=aligned(dy, down_EDH, z_PF),
    )
    columns = _triton.cdiv(H, tile["BN"])
    dot_PC = torch.empty(P, columns, dtype=torch.float32, device=dy.device)
    grouped_mm_dact_kernel[(tiles.num_tiles * columns,)](
        dy,
        down_EDH,
        z_PF,
        weights_P.contiguous(),
        dz_PF,
        wh_PH,
        dot_PC,
        plan.sorted_token_P,
        plan.order_P,
        tiles.expert_G,
        tiles.start_G,
        tiles.end_G,
        tiles.num_tiles,
        plan.num_experts,
        D,
        H,
        dy.stride(0),
        down_EDH.stride(0),
        down_EDH.stride(2),
        down_EDH.stride(1),
        GATHER=gather,
        ACTIVATION=activation,
        GATED=gated,
        EVEN_D=D % tile["BK"] == 0,
        PRECISION=precision(dy.dtype),
        BM=tiles.rows,
        BN=tile["BN"],
        BK=tile["BK"],
        GROUP=tile["GROUP"],
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return dz_PF, wh_PH, dot_PC.sum(1)
