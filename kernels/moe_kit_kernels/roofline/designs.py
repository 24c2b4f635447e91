"""Operators as rows of kernels: ours as launched, the least that memory allows, and what others do.

Peers' own kernels are counted generously: a library's GEMM moves each operand once from HBM, reads L2 in blocks of 256 x 256
(two 128 x 256 tiles that share an operand) and has no empty tiles; their grouped GEMMs are counted like ours. Elementwise
passes read and write what they must.

Legend: T tokens, K experts a token, P = T K pairs, E experts, D width in, O width out, H expert width, L rank.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from moe_kit_kernels import cost_model, tuning
from moe_kit_kernels.grouped_mm import sizes
from moe_kit_kernels.lora_experts import tiles
from moe_kit_kernels.roofline.grouped import (
    Runs,
    combine_cost,
    gather_cost,
    gram_cost,
    product_cost,
    scatter_backward_cost,
    scatter_cost,
)
from moe_kit_kernels.roofline.lora import down_dense_cost, up_dense_cost, up_sorted_cost
from moe_kit_kernels.roofline.model import H100, Cost, Device
from moe_kit_kernels.route_plan import tile_height

Designs = dict[str, list[Cost]]
_S = 2  # bytes of a bfloat16
_WORKERS = {"H100": 132, "A100": 108}
_CAPABILITY = {"H100": 90, "A100": 80}


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
    return tuning.fit(tuning.find(kernel, "default", limit, D, O, rows, gated), rows, _S, gated, limit)


def _product(device: Device, runs: Runs, D: int, O: int, rows: int, kernel: str = "grouped_mm", **more) -> Cost:
    tile = _tile(kernel, device, D, O, rows, bool(more.get("gated")))
    return product_cost(runs, D, O, rows=rows, BN=tile["BN"], group=tile["GROUP"], cache=device.cache, **more)


def _gram(device: Device, runs_z: Runs, runs_x: Runs, O: int, D: int) -> Cost:
    P, workers = sum(map(len, runs_z)), _WORKERS[device.name]
    tile = sizes.gram_tile(_tile("grouped_gram", device, D, O, tile_height(P, len(runs_z))), O, D)
    chunk = sizes.chunk_rows(P, -(-O // tile["BO"]) * -(-D // tile["BD"]), workers)
    more = {key: tile[key] for key in ("BO", "BD", "BR")}
    return gram_cost(runs_z, runs_x, O, D, **more, chunk=chunk, workers=workers, cache=device.cache)


def _passes(*elements: float) -> list[Cost]:
    return [Cost(n * _S, n * _S, 0.0) for n in elements]


def _gemm(M: int, N: int, K: int, adds: bool = False) -> Cost:
    """A library's dense GEMM: operands once from HBM, and from L2 once for each 256 x 256 block of the result."""
    result = M * N * (2 if adds else 1)
    return Cost(
        float(M * K + N * K + result) * _S,
        float(M * K * -(-N // 256) + N * K * -(-M // 256) + result) * _S,
        2.0 * M * N * K,
    )


def mlp_designs(
    T: int, K: int, E: int, D: int, H: int, *, device: Device = H100, backward: bool = False, keep: bool = True
) -> Designs:
    """Count one SwiGLU block.

    Args:
        T: Tokens.
        K: Experts a token.
        E: Experts.
        D: Width.
        H: Expert width.
        device: For its L2 and its tiles.
        backward: The backward alone, instead of the forward.
        keep: Training: the forward stores its pre-activations.

    Returns:
        Design -> its kernels in order. "minimum" reads x (dy, z) and the stacks once and writes y (dx, gradients) once.
    """
    P, route, rows = T * K, routed(T, K, E), tile_height(T * K, E)
    forward_flops, stacks = 6.0 * P * D * H, 3 * E * D * H
    if backward:
        least = float(2 * T * D + T * D + P * 2 * H + 2 * stacks) * _S
        ours = [
            _product(device, route.tokens, D, H, rows, "grouped_mm_dact", gated=True, through=True),
            _gram(device, route.tokens, route.positions, D, H),
            _gram(device, route.positions, route.tokens, 2 * H, D),
            _product(device, route.positions, 2 * H, D, rows),
            combine_cost(T, P, D, weighed=False),
        ]
        scatter = [
            # dy gathered and weighed, dh, gradient of the activation, gate's gradient against the kept result
            *_passes(2 * P * D, 2 * P * D),
            _product(device, route.positions, D, H, rows),
            *_passes(5 * P * H, 3 * P * H),
            _gram(device, route.positions, route.positions, D, H),
            _gram(device, route.positions, route.positions, 2 * H, D),
            _product(device, route.positions, 2 * H, D, rows),
            *_passes(2 * P * D, P * D + T * D),
        ]
        # forward's products twice, each expert over all tokens
        masked = [_gemm(T, D, H) for _ in range(6 * E)]
        copied = 6.0 * stacks / E * P * _S
    else:
        least = float(2 * T * D + stacks) * _S
        ours = [
            _product(device, route.tokens, D, H, rows, gated=True, keep=keep),
            _product(device, route.positions, H, D, rows),
            combine_cost(T, P, D),
        ]
        scatter = [
            *_passes(2 * P * D),
            _product(device, route.positions, D, 2 * H, rows),
            # silu of one half, product with the other
            *_passes(2 * P * H, 3 * P * H),
            ours[1],
            # weights, inverse permutation, sum over slots
            *_passes(2 * P * D, 2 * P * D, P * D + T * D),
        ]
        masked = [_gemm(T, 2 * H, D) for _ in range(E)] + [_gemm(T, D, H, adds=True) for _ in range(E)]
        copied = 3.0 * stacks / E * P * _S
    flops = forward_flops * (2 if backward else 1)
    return {
        "minimum": [Cost(least, least, flops)],
        "moe_kit": ours,
        "sort + scatter + combine": scatter,
        "loop over experts": [replace(cost, launches=E) for cost in scatter],
        "masked GEMMs": masked,
        "gathered bmm": [Cost(copied, copied, flops)],
    }


def _lora_parts(
    T: int,
    K: int,
    E: int,
    L: int,
    D: int,
    O: int,
    device: Device,
    route: Routed,
    how: str,
    *,
    weighed: bool,
    base: bool,
) -> tuple[Cost, Cost]:
    """Down [T, D] -> [P, L] and up [P, L] -> [T, O] of one order, as `lora_experts.launch` sizes them."""
    P = T * K
    if how == "dense":
        down = _down(T, K, E, L, D, device)
        return down, _up(T, K, E, L, O, device, weighed=weighed, base=base)
    down = _product(device, route.tokens, D, L, tile_height(P, E))
    rows = tile_height(T, E)
    tile = tiles.sorted_tile(rows, L)
    more = {"rows": rows, "BN": tile["BN"], "BL": tile["BL"], "width": tiles.group_columns(T, _S, tile["BN"])}
    return down, up_sorted_cost(route.slots, O, L, **more, weighed=weighed, base=base, cache=device.cache)


def _down(T: int, K: int, E: int, L: int, D: int, device: Device, backward: bool = False) -> Cost:
    EB, LP = tiles.column_block(E, L)
    more = {"BM": tiles.down_tile(T, E, L)["BM"], "EB": EB, "LP": LP, "slots": K, "backward": backward}
    return down_dense_cost(T, T * K, D, E, L, **more, cache=device.cache)


def _up(T: int, K: int, E: int, L: int, O: int, device: Device, *, weighed: bool, base: bool, linear: int = 0) -> Cost:
    BC, LP = tiles.up_columns(E, L)
    tile = tiles.up_tile(T, O, K, linear=linear > 0, capability=_CAPABILITY[device.name])
    more = {"BM": tile["BM"], "BN": tile["BN"], "BC": BC, "LP": LP, "slots": K, "linear": linear}
    return up_dense_cost(T, T * K, O, E, L, **more, weighed=weighed, base=base, cache=device.cache)


# `linear_designs` starts from the same counts
@lru_cache(maxsize=4)
def lora_designs(
    T: int, K: int, E: int, L: int, D: int, O: int, *, device: Device = H100, backward: bool = False
) -> Designs:
    """Count routed LoRA experts on one dense base, the base product itself left out.

    Args:
        T: Tokens.
        K: Experts a token.
        E: Experts.
        L: Rank.
        D: Width in.
        O: Width out.
        device: For its L2 and its tiles.
        backward: The backward alone (dx, dA, dB, gates), instead of the forward.

    Returns:
        Design -> its kernels in order; "moe_kit" is the order that the cost model chooses.
    """
    P, route, banks = T * K, routed(T, K, E), E * L * (D + O)
    X, Y, R, C = T * D, T * O, P * L, T * E * L
    shape = cost_model.LoraShape(tokens=T, pairs=P, experts=E, rank=L, d_in=D, d_out=O, itemsize=_S)
    chosen = cost_model.choose_lora(shape, getattr(cost_model, device.name), training=True)
    found: Designs = {}
    if backward:
        # dy, x and H read once, dx and the gradients written once: what one pass over dy for everything would need
        least = float(Y + 2 * X + R + 2 * banks) * _S
        grams = [
            # H and dH into sorted order, H weighed
            *_passes(2 * R, 2 * R, 2 * R),
            _gram(device, route.positions, route.tokens, L, D),
            _gram(device, route.tokens, route.positions, O, L),
        ]
        for how in ("dense", "sorted"):
            if how == "dense":
                down = [_down(T, K, E, L, O, device, backward=True)]
            else:
                down = [_lora_parts(T, K, E, L, O, D, device, route, how, weighed=False, base=False)[0]]
                # gate's gradient and dH from U, in rank space
                down += _passes(2 * R, 2 * R)
            up = _lora_parts(T, K, E, L, O, D, device, route, how, weighed=False, base=False)[1]
            found[f"moe_kit {how}"] = [*down, up, *grams]
        down_sorted = _lora_parts(T, K, E, L, O, D, device, route, "sorted", weighed=False, base=False)[0]
        found["sorted down + k read-modify-writes"] = [down_sorted, *_passes(2 * R, R + E * L * D + K * 2 * X), *grams]
        gathered = _passes(2 * P * O, 2 * P * D)
        found["sort + scatter + combine"] = [
            *gathered,
            down_sorted,
            *_passes(2 * R, R + E * L * D + P * D, P * D + X),
            *grams,
        ]
        found["masked GEMM pair"] = [
            *(_gemm(T, E * L, O), *_passes(2 * C, 2 * C)),
            *(_gemm(T, D, E * L), _gemm(E * L, D, T), _gemm(O, E * L, T)),
        ]
    else:
        # indices are left out everywhere
        least = float(X + banks + 2 * R + 2 * Y) * _S
        for how in ("dense", "sorted"):
            found[f"moe_kit {how}"] = list(_lora_parts(T, K, E, L, D, O, device, route, how, weighed=True, base=True))
        down_sorted = found["moe_kit sorted"][0]
        found["sorted down + k read-modify-writes"] = [down_sorted, *_passes(R + E * L * O + K * 2 * Y)]
        found["sort + scatter + combine"] = [
            *_passes(2 * P * D),
            down_sorted,
            *_passes(R + E * L * O + P * O, P * O + 2 * Y),
        ]
        found["masked GEMM pair"] = [_gemm(T, E * L, D), *_passes(2 * C), _gemm(T, O, E * L, adds=True)]
    found["loop over experts"] = [replace(cost, launches=E) for cost in found["sort + scatter + combine"]]
    copied = 3.0 * P * L * (D + O) * _S
    flops = 2.0 * P * L * (D + O) * (2 if backward else 1)
    best = found["moe_kit sorted" if chosen == "sorted" else "moe_kit dense"]
    return {
        "minimum": [Cost(least, least, flops)],
        f"moe_kit ({'sorted' if chosen == 'sorted' else 'dense'})": best,
        **found,
        "gathered bmm": [Cost(copied, copied, flops)],
    }


def linear_designs(
    T: int, K: int, E: int, L: int, D: int, O: int, *, device: Device = H100, backward: bool = False
) -> Designs:
    """Count a dense linear with routed LoRA experts, base product included.

    Args:
        T: Tokens.
        K: Experts a token.
        E: Experts.
        L: Rank.
        D: Width in.
        O: Width out.
        device: For its L2 and its tiles.
        backward: The backward alone (dx, dA, dB, gates; the base weight is frozen), instead of the forward.

    Returns:
        "K-extension" has the base product inside; the others add the library's GEMM to a design of `lora_designs`.
    """
    lora = lora_designs(T, K, E, L, D, O, device=device, backward=backward)
    wide, narrow = (D, O) if backward else (O, D)
    base = _gemm(T, wide, narrow)
    fused = _up(T, K, E, L, wide, device, weighed=not backward, base=False, linear=narrow)
    dense = lora["moe_kit dense"]
    inside = [dense[0], fused, *dense[2:]]
    # a result that is there already is added to: in the backward by autograd's sum of two gradients
    added = _passes(3 * T * D) if backward else []
    minimum = lora["minimum"][0]
    # what the base GEMM writes, the experts neither read nor write again
    saved = float(2 * T * wide if not backward else T * wide) * _S
    least = minimum.hbm_bytes + base.hbm_bytes - saved
    ours = next(name for name in lora if name.startswith("moe_kit ("))
    return {
        "minimum": [Cost(least, least, minimum.flops + base.flops)],
        "K-extension": inside,
        f"library GEMM + {ours}": [base, *lora[ours], *added],
        "library GEMM + masked GEMM pair": [base, *lora["masked GEMM pair"], *added],
        "library GEMM + sort + scatter + combine": [base, *lora["sort + scatter + combine"], *added],
    }


def grouped_lora_designs(
    T: int, K: int, E: int, L: int, D: int, O: int, *, device: Device = H100, backward: bool = False
) -> Designs:
    """Count LoRA on every expert of a stack: gathered rows in, sorted rows out.

    Args:
        T: Tokens.
        K: Experts a token.
        E: Experts.
        L: Rank.
        D: Width in.
        O: Width out.
        device: For its L2 and its tiles.
        backward: The backward alone (dx by token, dA, dB; the stack is frozen), instead of the forward.

    Returns:
        Design -> its kernels in order.
    """
    P, route, rows = T * K, routed(T, K, E), tile_height(T * K, E)
    R, banks, flops = P * L, E * L * (D + O), 2.0 * P * (D * O + L * (D + O))
    if backward:
        grams = [
            _gram(device, route.positions, route.tokens, L, D),
            _gram(device, route.positions, route.positions, O, L),
        ]
        u = [_product(device, route.positions, O, L, rows), *_passes(2 * R)]
        end = [combine_cost(T, P, D, weighed=False), *grams]
        ours = [*u, _product(device, route.positions, O, D, rows, "lora_grouped", rank=L), *end]
        plain = _product(device, route.positions, O, D, rows)
        after = [*u, plain, _product(device, route.positions, L, D, rows), *_passes(2 * P * D), *end]
        merged = [*_passes(2 * E * D * O), plain, end[0], _gram(device, route.positions, route.tokens, O, D)]
        merged += _passes(2 * E * D * O + banks, 2 * E * D * O + banks)
        least = float(P * O + 2 * T * D + E * D * O + 2 * banks + R) * _S
        flops += 2.0 * R * (D + O)
    else:
        h = [_product(device, route.tokens, D, L, rows), *_passes(2 * R)]
        ours = [*h, _product(device, route.tokens, D, O, rows, "lora_grouped", rank=L)]
        plain = _product(device, route.tokens, D, O, rows)
        after = [*h, plain, _product(device, route.positions, L, O, rows), *_passes(2 * P * O)]
        merged = [*_passes(2 * E * D * O + banks), plain]
        least = float(T * D + P * O + E * D * O + banks + R) * _S
    return {
        "minimum": [Cost(least, least, flops)],
        "moe_kit": ours,
        "base, then LoRA added": after,
        "W + BA materialised": merged,
    }


def compaction_designs(T: int, kept: float, D: int, *, device: Device = H100, backward: bool = False) -> Designs:
    """Count the packing of kept tokens and the weighted add of a unit's result, the unit itself left out.

    Args:
        T: Tokens.
        kept: Share of tokens that run through the unit.
        D: Width.
        device: Not read: nothing here is reused.
        backward: The backward alone, instead of the forward.

    Returns:
        Design -> its kernels in order; slots are as many as tokens, as on a GPU.
    """
    used = round(T * kept)
    if backward:
        ours = [scatter_backward_cost(T, used, D), gather_cost(T, used, D)]
        # dx of the packed rows is spread over zeros, dy passes to the base as it is
        least = float(3 * used * D + (T + used) * D) * _S
        plain = _passes(2 * used * D, 3 * used * D, 2 * used * D, T * D + 2 * used * D)
    else:
        ours = [gather_cost(T, used, D), scatter_cost(T, used, D)]
        least = float((2 * used + 2 * T + used) * D) * _S
        plain = _passes(2 * used * D, 2 * T * D, 2 * used * D, 3 * used * D)
    return {"minimum": [Cost(least, least, 0.0)], "moe_kit": ours, "index, multiply, index_add": plain}
