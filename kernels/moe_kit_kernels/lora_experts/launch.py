"""Launchers of the LoRA kernels: strides, grids, specialisation switches; tile sizes come from `tiles`.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

import torch
import triton as _triton
from torch import Tensor

from moe_kit_kernels.common.device import on_its_device
from moe_kit_kernels.lora_experts import tiles as sizes
from moe_kit_kernels.lora_experts.triton import (
    lora_decode_down_kernel,
    lora_decode_up_kernel,
    lora_down_dense_kernel,
    lora_up_dense_kernel,
    lora_up_sorted_kernel,
)
from moe_kit_kernels.route_plan import RoutePlan, slot_tile_maps, tile_height


def precision(dtype: torch.dtype) -> str:
    """Tell how float32 products are made: TF32 where torch allows it for its own, else exact.

    Args:
        dtype: dtype of the product's inputs.

    Returns:
        "tf32" or "ieee".
    """
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def capability(device: torch.device) -> int:
    """Tell a device's compute capability.

    Args:
        device: where a kernel runs.

    Returns:
        Ten times the capability, such as 90; 0 under the interpreter.
    """
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@on_its_device
def down_dense(
    x_TD: Tensor,
    A_ELD: Tensor,
    plan: RoutePlan,
    *,
    weights: Tensor | None = None,
    kept_PL: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Launch `lora_down_dense_kernel`.

    Args:
        x_TD: [T, D] inputs; in the backward the gradient [T, O].
        A_ELD: [E, L, D], any strides; in the backward B as [E, L, O].
        plan: the routing, from a [T, K] table.
        weights: [T, K] float32, for the backward.
        kept_PL: the forward's H, for the backward.
        scale: factor on the sum, for the backward.

    Returns:
        H [P, L] (0 for dropped pairs) and None; in the backward dH [P, L] and dw [T, K] float32.
    """
    assert plan.slots is not None
    x_TD = _rows(x_TD)
    (T, D), (E, L, _), K = x_TD.shape, A_ELD.shape, plan.slots
    dtype = torch.promote_types(x_TD.dtype, A_ELD.dtype)
    H_PL = x_TD.new_zeros(T * K, L, dtype=dtype)
    backward = weights is not None
    dw_TK = x_TD.new_zeros(T, K, dtype=torch.float32) if backward else None
    if T == 0 or K == 0:
        return H_PL, dw_TK
    EB, LP = sizes.column_block(E, L)
    default = sizes.down_tile(T, E, L, dtype.itemsize)
    more = {"width_in": D, "width_out": E * L, "rank": L, "itemsize": dtype.itemsize, "columns": EB * LP}
    tile = sizes.tuned("lora_down_dense", x_TD.device, default, rows=default["BM"], **more)
    BM, BK = tile["BM"], tile["BK"]
    grid = (_triton.cdiv(T, BM) * _triton.cdiv(E, EB),)
    lora_down_dense_kernel[grid](
        x_TD,
        A_ELD,
        plan.expert_P,
        H_PL,
        weights.contiguous() if weights is not None else x_TD,
        kept_PL if kept_PL is not None else H_PL,
        dw_TK if dw_TK is not None else H_PL,
        scale,
        T,
        D,
        E,
        L,
        x_TD.stride(0),
        *A_ELD.stride(),
        K=K,
        BACKWARD=backward,
        EVEN_D=D % BK == 0,
        PRECISION=precision(dtype),
        BM=BM,
        EB=EB,
        LP=LP,
        BK=BK,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return H_PL, dw_TK


@on_its_device
def up_dense(
    H_PL: Tensor,
    B_EOL: Tensor,
    plan: RoutePlan,
    out_dtype: torch.dtype,
    *,
    weights: Tensor | None = None,
    scale: float = 1.0,
    base_TO: Tensor | None = None,
    linear: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Launch `lora_up_dense_kernel`.

    Args:
        H_PL: [P, L] in the given order.
        B_EOL: [E, O, L], any strides; for dx A as [E, D, L].
        plan: the routing, from a [T, K] table.
        out_dtype: dtype of the result.
        weights: [T, K] float32, or None when H is weighed already.
        scale: factor that goes with the weights.
        base_TO: added.
        linear: (x [T, D], W [O, D], bias or None): the base product is computed inside.

    Returns:
        [T, O].
    """
    assert plan.slots is not None
    (E, O, L), K, T = B_EOL.shape, plan.slots, plan.num_tokens
    y_TO = H_PL.new_empty(T, O, dtype=out_dtype)
    if T == 0:
        return y_TO
    # the wider of the operands decides: adapters in float32 on a bfloat16 base multiply in float32
    size = max(B_EOL.element_size(), linear[1].element_size() if linear is not None else 0)
    LP = sizes.up_columns(E, L)[1]
    options = {"linear": linear is not None, "capability": capability(H_PL.device), "itemsize": size, "columns": E * LP}
    default = sizes.up_tile(T, O, K, **options)
    more = {"width_in": E * L, "width_out": O, "rank": L, "itemsize": size}
    kernel = "lora_up_dense" if linear is None else "lora_linear"
    tile = sizes.tuned(kernel, H_PL.device, default, rows=default["BM"], **more)
    BM, BN, BK = tile["BM"], tile["BN"], tile["BK"]
    BC, LP = sizes.up_columns(E, L, size, BM, K)
    x_TD, W_OD, bias_O = linear if linear is not None else (H_PL, B_EOL[0], None)
    x_TD = _rows(x_TD)
    base_TO = None if base_TO is None else _rows(base_TO)
    D = x_TD.shape[1]
    lora_up_dense_kernel[(_triton.cdiv(T, BM) * _triton.cdiv(O, BN),)](
        H_PL.contiguous(),
        B_EOL,
        plan.expert_P,
        weights.contiguous() if weights is not None else H_PL,
        base_TO if base_TO is not None else H_PL,
        y_TO,
        x_TD,
        W_OD,
        bias_O if bias_O is not None else H_PL,
        scale,
        T,
        O,
        D,
        E,
        L,
        *B_EOL.stride(),
        base_TO.stride(0) if base_TO is not None else 0,
        x_TD.stride(0),
        W_OD.stride(0),
        W_OD.stride(1),
        K=K,
        WEIGHTS=weights is not None,
        BASE=base_TO is not None,
        LINEAR=linear is not None,
        BIAS=bias_O is not None,
        EVEN_D=D % BK == 0,
        PRECISION=precision(H_PL.dtype),
        BM=BM,
        BN=BN,
        BK=BK,
        BC=BC,
        LP=LP,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return y_TO


@on_its_device
def up_sorted(
    H_PL: Tensor,
    B_EOL: Tensor,
    plan: RoutePlan,
    out_dtype: torch.dtype,
    *,
    weights: Tensor | None = None,
    scale: float = 1.0,
    base_TO: Tensor | None = None,
) -> Tensor:
    """Launch `lora_up_sorted_kernel`, column group by column group and slot by slot.

    A group's block of y stays in L2 while the slots pass over it, so main memory sees y about once, not K times. The sum
    is rounded to the result's dtype after every slot.

    Args:
        H_PL: [P, L] in the given order.
        B_EOL: [E, O, L], any strides; for dx A as [E, D, L].
        plan: the routing, from a [T, K] table.
        out_dtype: dtype of the result.
        weights: [T, K] float32, or None when H is weighed already.
        scale: factor that goes with the weights.
        base_TO: added.

    Returns:
        [T, O].
    """
    assert plan.slots is not None
    (E, O, L), K, T = B_EOL.shape, plan.slots, plan.num_tokens
    y_TO = H_PL.new_empty(T, O, dtype=out_dtype)
    if T == 0:
        return y_TO
    H_PL = H_PL.contiguous()
    base_TO = None if base_TO is None else _rows(base_TO)
    rows, size = tile_height(T, E), B_EOL.element_size()
    more = {"width_in": E * L, "width_out": O, "rank": L, "itemsize": size}
    tile = sizes.tuned("lora_up_sorted", H_PL.device, sizes.sorted_tile(rows, L, size), rows=rows, **more)
    BN = tile["BN"]
    width = sizes.group_columns(T, y_TO.element_size(), BN)
    maps = slot_tile_maps(plan, rows)
    for first in range(0, O, width):
        end = min(O, first + width)
        for slot, (part, tiles) in enumerate(maps):
            lora_up_sorted_kernel[(tiles.num_tiles * _triton.cdiv(end - first, BN),)](
                H_PL,
                B_EOL,
                weights.contiguous() if weights is not None else H_PL,
                base_TO if base_TO is not None else H_PL,
                y_TO,
                part.sorted_token_P,
                tiles.expert_G,
                tiles.start_G,
                tiles.end_G,
                scale,
                slot,
                first,
                end,
                O,
                E,
                L,
                *B_EOL.stride(),
                base_TO.stride(0) if base_TO is not None else 0,
                K=K,
                FIRST=slot == 0,
                WEIGHTS=weights is not None,
                BASE=base_TO is not None,
                PRECISION=precision(H_PL.dtype),
                BM=tiles.rows,
                BN=BN,
                BL=tile["BL"],
                num_warps=tile["num_warps"],
                num_stages=tile["num_stages"],
            )
    return y_TO


@on_its_device
def decode(
    x_TD: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    plan: RoutePlan,
    weights: Tensor,
    scale: float,
    base_TO: Tensor | None,
) -> Tensor:
    """Launch the two decode kernels: the forward for a few tokens, no sort.

    Args:
        x_TD: [T, D] inputs.
        A_ELD: [E, L, D].
        B_EOL: [E, O, L].
        plan: the routing, from a [T, K] table.
        weights: [T, K] float32.
        scale: factor on the sum.
        base_TO: added.

    Returns:
        [T, O] in the dtype of the base, else of x.
    """
    assert plan.slots is not None
    x_TD = _rows(x_TD)
    base_TO = None if base_TO is None else _rows(base_TO)
    (T, D), (E, O, L), K = x_TD.shape, B_EOL.shape, plan.slots
    y_TO = x_TD.new_empty(T, O, dtype=x_TD.dtype if base_TO is None else base_TO.dtype)
    if T == 0:
        return y_TO
    H_PL = x_TD.new_empty(T * K, L, dtype=torch.float32)
    LP, BK, BN = sizes.decode_tile(L)
    if K:
        lora_decode_down_kernel[(T * K,)](
            x_TD, A_ELD, plan.expert_P, H_PL, D, E, L, x_TD.stride(0), *A_ELD.stride(), K=K, LP=LP, BK=BK, num_warps=4
        )
    lora_decode_up_kernel[(T, _triton.cdiv(O, BN))](
        H_PL,
        B_EOL,
        plan.expert_P,
        weights.contiguous(),
        base_TO if base_TO is not None else H_PL,
        y_TO,
        scale,
        O,
        E,
        L,
        *B_EOL.stride(),
        base_TO.stride(0) if base_TO is not None else 0,
        K=K,
        BASE=base_TO is not None,
        BN=BN,
        LP=LP,
        num_warps=4,
    )
    return y_TO
