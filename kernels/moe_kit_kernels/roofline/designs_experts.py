"""Designs of the operators on experts' own weights, and of compaction: ours as launched, the least that memory allows, others'.

Peers' own kernels are counted generously: a library's GEMM moves each operand once from HBM, reads L2 in blocks of 256 x 256
(two 128 x 256 tiles that share an operand) and has no empty tiles; their grouped GEMMs are counted like ours. Elementwise
passes read and write what they must.

Legend: T tokens, K experts a token, P = T K pairs, E experts, D width in, O width out, H expert width, L rank.
"""

from dataclasses import replace

from moe_kit_kernels.roofline.grouped import combine_cost, gather_cost, scatter_backward_cost, scatter_cost
from moe_kit_kernels.roofline.model import H100, Cost, Device
from moe_kit_kernels.roofline.parts import Designs, S, gemm, gram, passes, product, routed
from moe_kit_kernels.route_plan import tile_height


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
        least = float(2 * T * D + T * D + P * 2 * H + 2 * stacks) * S
        ours = [
            product(device, route.tokens, D, H, rows, "grouped_mm_dact", gated=True, through=True),
            gram(device, route.tokens, route.positions, D, H),
            gram(device, route.positions, route.tokens, 2 * H, D),
            product(device, route.positions, 2 * H, D, rows),
            combine_cost(T, P, D, weighed=False),
        ]
        scatter = [
            # dy gathered and weighed, dh, gradient of the activation, gate's gradient against the kept result
            *passes(2 * P * D, 2 * P * D),
            product(device, route.positions, D, H, rows),
            *passes(5 * P * H, 3 * P * H),
            gram(device, route.positions, route.positions, D, H),
            gram(device, route.positions, route.positions, 2 * H, D),
            product(device, route.positions, 2 * H, D, rows),
            *passes(2 * P * D, P * D + T * D),
        ]
        # forward's products twice, each expert over all tokens
        masked = [gemm(T, D, H) for _ in range(6 * E)]
        copied = 6.0 * stacks / E * P * S
    else:
        least = float(2 * T * D + stacks) * S
        ours = [
            product(device, route.tokens, D, H, rows, gated=True, keep=keep),
            product(device, route.positions, H, D, rows),
            combine_cost(T, P, D),
        ]
        scatter = [
            *passes(2 * P * D),
            product(device, route.positions, D, 2 * H, rows),
            # silu of one half, product with the other
            *passes(2 * P * H, 3 * P * H),
            ours[1],
            # weights, inverse permutation, sum over slots
            *passes(2 * P * D, 2 * P * D, P * D + T * D),
        ]
        masked = [gemm(T, 2 * H, D) for _ in range(E)] + [gemm(T, D, H, adds=True) for _ in range(E)]
        copied = 3.0 * stacks / E * P * S
    flops = forward_flops * (2 if backward else 1)
    return {
        "minimum": [Cost(least, least, flops)],
        "moe_kit": ours,
        "sort + scatter + combine": scatter,
        "loop over experts": [replace(cost, launches=E) for cost in scatter],
        "masked GEMMs": masked,
        "gathered bmm": [Cost(copied, copied, flops)],
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
            gram(device, route.positions, route.tokens, L, D),
            gram(device, route.positions, route.positions, O, L),
        ]
        u = [product(device, route.positions, O, L, rows), *passes(2 * R)]
        end = [combine_cost(T, P, D, weighed=False), *grams]
        ours = [*u, product(device, route.positions, O, D, rows, "lora_grouped", rank=L), *end]
        plain = product(device, route.positions, O, D, rows)
        after = [*u, plain, product(device, route.positions, L, D, rows), *passes(2 * P * D), *end]
        merged = [*passes(2 * E * D * O), plain, end[0], gram(device, route.positions, route.tokens, O, D)]
        merged += passes(2 * E * D * O + banks, 2 * E * D * O + banks)
        least = float(P * O + 2 * T * D + E * D * O + 2 * banks + R) * S
        flops += 2.0 * R * (D + O)
    else:
        h = [product(device, route.tokens, D, L, rows), *passes(2 * R)]
        ours = [*h, product(device, route.tokens, D, O, rows, "lora_grouped", rank=L)]
        plain = product(device, route.tokens, D, O, rows)
        after = [*h, plain, product(device, route.positions, L, O, rows), *passes(2 * P * O)]
        merged = [*passes(2 * E * D * O + banks), plain]
        least = float(T * D + P * O + E * D * O + banks + R) * S
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
        least = float(3 * used * D + (T + used) * D) * S
        plain = passes(2 * used * D, 3 * used * D, 2 * used * D, T * D + 2 * used * D)
    else:
        ours = [gather_cost(T, used, D), scatter_cost(T, used, D)]
        least = float((2 * used + 2 * T + used) * D) * S
        plain = passes(2 * used * D, 2 * T * D, 2 * used * D, 3 * used * D)
    return {"minimum": [Cost(least, least, 0.0)], "moe_kit": ours, "index, multiply, index_add": plain}
