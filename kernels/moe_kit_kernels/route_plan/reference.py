"""The obvious way to plan a routing: Python loops over pairs. The oracle of `route_plan`, for tests.

Legend: T tokens, P pairs, E experts.
"""


def route_plan_reference(token_P: list[int], expert_P: list[int], num_tokens: int, num_experts: int) -> dict[str, list]:
    """Count, order and offset the pairs by hand.

    Args:
        token_P: token of each pair; outside [0, num_tokens) the pair is dropped.
        expert_P: expert of each pair; outside [0, num_experts) the pair is dropped.
        num_tokens: T.
        num_experts: E.

    Returns:
        `counts_E`, `offsets_E1`, `order_P`, `inverse_P`, as in `RoutePlan`.
    """
    kept = [
        e if 0 <= t < num_tokens and 0 <= e < num_experts else num_experts
        for t, e in zip(token_P, expert_P, strict=True)
    ]
    counts = [sum(1 for e in kept if e == expert) for expert in range(num_experts)]
    offsets = [sum(counts[:expert]) for expert in range(num_experts + 1)]
    order = [p for expert in range(num_experts + 1) for p, e in enumerate(kept) if e == expert]
    inverse = [order.index(p) for p in range(len(kept))]
    return {"counts_E": counts, "offsets_E1": offsets, "order_P": order, "inverse_P": inverse}
