"""Designs of routed LoRA experts on one dense base, without and with the base product; peers are counted as in `designs_experts`.

Legend: T tokens, K experts a token, P = T K pairs, E experts, D width in, O width out, L rank.
"""

from dataclasses import replace
from functools import lru_cache

from moe_kit_kernels import cost_model
from moe_kit_kernels.lora_experts import tiles
from moe_kit_kernels.roofline.lora import down_dense_cost, up_dense_cost, up_sorted_cost
from moe_kit_kernels.roofline.model import H100, Cost, Device
from moe_kit_kernels.roofline.parts import CAPABILITY, Designs, S, gemm, gram, passes, product, routed
from moe_kit_kernels.route_plan import tile_height

FORMS = ("dense", "mixed", "sorted")
"""Forms of our kernels; "mixed" is sorted down, dense up."""


def _pair(
    T: int, K: int, E: int, L: int, D: int, O: int, device: Device, how: str, *, weighed: bool, base: bool
) -> tuple[list[Cost], Cost]:
    """Down [T, D] -> [P, L] and up [P, L] -> [T, O] of one form; the unweighed pair is the backward's, from dy to dx."""
    if how == "dense":
        down = [_down(T, K, E, L, D, device, backward=not weighed)]
    else:
        down = [_down_sorted(T, K, E, L, D, device, tiles.by_token(E, L, D, S))]
        # gate's gradient and dH from U, in rank space
        down += [] if weighed else passes(2 * T * K * L, 2 * T * K * L)
    up = _up_sorted if how == "sorted" else _up
    return down, up(T, K, E, L, O, device, weighed=weighed, base=base)


@lru_cache(maxsize=8)
def _down_sorted(T: int, K: int, E: int, L: int, D: int, device: Device, by_token: bool) -> Cost:
    return product(device, routed(T, K, E).tokens, D, L, tiles.down_rows(T * K, E, L), by_token=by_token)


def _up_sorted(T: int, K: int, E: int, L: int, O: int, device: Device, *, weighed: bool, base: bool) -> Cost:
    rows = tile_height(T, E)
    tile = tiles.sorted_tile(rows, L)
    more = {"rows": rows, "BN": tile["BN"], "BL": tile["BL"], "width": tiles.group_columns(T, S, tile["BN"])}
    return up_sorted_cost(routed(T, K, E).slots, O, L, **more, weighed=weighed, base=base, cache=device.cache)


def _down(T: int, K: int, E: int, L: int, D: int, device: Device, backward: bool = False) -> Cost:
    EB, LP = tiles.column_block(E, L)
    more = {"BM": tiles.down_tile(T, E, L)["BM"], "EB": EB, "LP": LP, "slots": K, "backward": backward}
    return down_dense_cost(T, T * K, D, E, L, **more, cache=device.cache)


def _up(T: int, K: int, E: int, L: int, O: int, device: Device, *, weighed: bool, base: bool, linear: int = 0) -> Cost:
    columns = E * tiles.up_columns(E, L)[1]
    tile = tiles.up_tile(T, O, K, linear=linear > 0, capability=CAPABILITY[device.name], columns=columns)
    BC, LP = tiles.up_columns(E, L, rows=tile["BM"], slots=K)
    more = {"BM": tile["BM"], "BN": tile["BN"], "BC": BC, "LP": LP, "slots": K, "linear": linear}
    return up_dense_cost(T, T * K, O, E, L, **more, weighed=weighed, base=base, cache=device.cache)


# `linear_designs` starts from the same counts
@lru_cache(maxsize=64)
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
    shape = cost_model.LoraShape(tokens=T, pairs=P, experts=E, rank=L, d_in=D, d_out=O, itemsize=S)
    chosen = cost_model.choose_lora(shape, getattr(cost_model, device.name), training=True)
    found: Designs = {}
    if backward:
        # dy, x and H read once, dx and the gradients written once: what one pass over dy for everything would need
        least = float(Y + 2 * X + R + 2 * banks) * S
        grams = [
            # H and dH into sorted order, H weighed
            *passes(2 * R, 2 * R, 2 * R),
            gram(device, route.positions, route.tokens, L, D),
            gram(device, route.tokens, route.positions, O, L),
        ]
        for how in FORMS:
            down, up = _pair(T, K, E, L, O, D, device, how, weighed=False, base=False)
            found[f"moe_kit {how}"] = [*down, up, *grams]
        # as others order it: by expert, so that x is read for every pair
        down_sorted = _down_sorted(T, K, E, L, O, device, by_token=False)
        found["sorted down + k read-modify-writes"] = [down_sorted, *passes(2 * R, R + E * L * D + K * 2 * X), *grams]
        gathered = passes(2 * P * O, 2 * P * D)
        found["sort + scatter + combine"] = [
            *gathered,
            down_sorted,
            *passes(2 * R, R + E * L * D + P * D, P * D + X),
            *grams,
        ]
        found["masked GEMM pair"] = [
            *(gemm(T, E * L, O), *passes(2 * C, 2 * C)),
            *(gemm(T, D, E * L), gemm(E * L, D, T), gemm(O, E * L, T)),
        ]
    else:
        # indices are left out everywhere
        least = float(X + banks + 2 * R + 2 * Y) * S
        for how in FORMS:
            down, up = _pair(T, K, E, L, D, O, device, how, weighed=True, base=True)
            found[f"moe_kit {how}"] = [*down, up]
        down_sorted = _down_sorted(T, K, E, L, D, device, by_token=False)
        found["sorted down + k read-modify-writes"] = [down_sorted, *passes(R + E * L * O + K * 2 * Y)]
        found["sort + scatter + combine"] = [
            *passes(2 * P * D),
            down_sorted,
            *passes(R + E * L * O + P * O, P * O + 2 * Y),
        ]
        found["masked GEMM pair"] = [gemm(T, E * L, D), *passes(2 * C), gemm(T, O, E * L, adds=True)]
    found["loop over experts"] = [replace(cost, launches=E) for cost in found["sort + scatter + combine"]]
    copied = 3.0 * P * L * (D + O) * S
    flops = 2.0 * P * L * (D + O) * (2 if backward else 1)
    return {
        "minimum": [Cost(least, least, flops)],
        f"moe_kit ({chosen})": found[f"moe_kit {chosen}"],
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
    base = gemm(T, wide, narrow)
    fused = _up(T, K, E, L, wide, device, weighed=not backward, base=False, linear=narrow)
    dense = lora["moe_kit dense"]
    inside = [dense[0], fused, *dense[2:]]
    # a result that is there already is added to: in the backward by autograd's sum of two gradients
    added = passes(3 * T * D) if backward else []
    minimum = lora["minimum"][0]
    # what the base GEMM writes, the experts neither read nor write again
    saved = float(2 * T * wide if not backward else T * wide) * S
    least = minimum.hbm_bytes + base.hbm_bytes - saved
    ours = next(name for name in lora if name.startswith("moe_kit ("))
    return {
        "minimum": [Cost(least, least, minimum.flops + base.flops)],
        "K-extension": inside,
        f"library GEMM + {ours}": [base, *lora[ours], *added],
        "library GEMM + masked GEMM pair": [base, *lora["masked GEMM pair"], *added],
        "library GEMM + sort + scatter + combine": [base, *lora["sort + scatter + combine"], *added],
    }
