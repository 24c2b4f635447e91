"""Bytes of top-k gating: our two kernels, counted from their loops, and the passes of plain PyTorch.

Nothing here reaches the matrix units, and a row of logits is read once by the program that needs it, so memory decides. Unlike
in `grouped`, the integers count: ids and counts are results.

Legend: T tokens, K experts a token, E experts; logits and weights are float32, ids and counts int64.
"""

from moe_kit_kernels.grouped_mm.sizes import next_power_of_2
from moe_kit_kernels.roofline.model import H100, Cost, Device
from moe_kit_kernels.roofline.parts import Designs


def _programs(T: int, E: int) -> int:
    # as `topk_gate.triton_autograd.block_rows`, which needs triton
    return -(-T // max(1, min(64, 1024 // next_power_of_2(E))))


def gate_cost(T: int, K: int, E: int, *, bias: bool = False) -> Cost:
    """Count one launch of `topk_gate_kernel`: logits read once, ids, weights and one row of counts a program written.

    Args:
        T: Tokens.
        K: Experts a token.
        E: Experts.
        bias: Every program reads the selection bias.

    Returns:
        Its cost; a comparison and a sum for each element and slot.
    """
    moved = float(4 * T * E + 12 * T * K + 8 * _programs(T, E) * E)
    return Cost(moved + 4 * E * bias, moved + 4 * E * bias * _programs(T, E), 2.0 * T * E * (K + 2))


def gate_backward_cost(T: int, K: int, E: int) -> Cost:
    """Count one launch of `topk_gate_backward_kernel`: logits, ids and dw read, dlogits written.

    Args:
        T: Tokens.
        K: Experts a token.
        E: Experts.

    Returns:
        Its cost.
    """
    moved = float(8 * T * E + 12 * T * K)
    return Cost(moved, moved, 2.0 * T * E * (K + 4))


def gate_designs(T: int, K: int, E: int, *, device: Device = H100, backward: bool = False) -> Designs:
    """Count softmax, top-k, renormalisation and histogram.

    Args:
        T: Tokens.
        K: Experts a token.
        E: Experts.
        device: Not read: nothing here is reused.
        backward: The backward alone, instead of the forward.

    Returns:
        Design -> its kernels in order; "separate passes" is softmax, topk, sum, division and a scattered histogram.
    """

    def passes(*bytes_: float) -> list[Cost]:
        return [Cost(float(n), float(n), 0.0) for n in bytes_]

    logits, ids, weights = 4 * T * E, 8 * T * K, 4 * T * K
    if backward:
        least = Cost(2.0 * logits + ids + weights, 2.0 * logits + ids + weights, 0.0)
        # through the division: dw and the chosen scores read, a sum a row; then zeros, the scatter, and the softmax
        separate = passes(4 * weights, logits, ids + 2 * weights, 3 * logits)
        return {"minimum": [least], "moe_kit": [gate_backward_cost(T, K, E)], "separate passes": separate}
    least = Cost(float(logits + ids + weights + 8 * E), float(logits + ids + weights + 8 * E), 0.0)
    # the partial counts are added by a second kernel
    ours = [gate_cost(T, K, E), *passes(8 * (_programs(T, E) + 1) * E)]
    separate = passes(2 * logits, logits + ids + weights, weights + 4 * T, 2 * weights + 4 * T, ids + 8 * T * K + 8 * E)
    return {"minimum": [least], "moe_kit": ours, "separate passes": separate}
