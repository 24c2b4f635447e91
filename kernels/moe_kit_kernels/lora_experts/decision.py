"""The routing of a call as the caller gave it, its checks, and the plan that comes out of it.

Legend: T tokens, K slots a token, P pairs, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kit_kernels.common.checks import check_shape, fail
from moe_kit_kernels.route_plan import RoutePlan, check_bounds, check_ids, check_plan_device, route_plan


class Decision(NamedTuple):
    """The routing as the caller gave it: ids, or a plan, or neither (every expert)."""

    ids_TK: Tensor | None
    """[T, K] ids or None."""
    weights: Tensor
    """[T, K] or [P]; [T, E] with neither ids nor plan."""
    plan: RoutePlan | None
    """A plan made before, or None."""


def resolve_plan(operator: str, T: int, E: int, decision: Decision) -> RoutePlan | None:
    """Find the plan of a call and check it against the sizes of x, of the experts and of the weights.

    Args:
        operator: public name, for messages.
        T: rows of x.
        E: experts of the bank.
        decision: the routing.

    Returns:
        The plan, or None when every expert is chosen.

    Raises:
        KernelError: sizes disagree, or ids are below -1.
    """
    check_decision(operator, T, E, decision)
    if decision.plan is not None:
        return decision.plan
    return None if decision.ids_TK is None else route_plan(decision.ids_TK, E)


def gates_of_table(operator: str, T: int, E: int, decision: Decision) -> Tensor | None:
    """Dense table of the weights without a plan, differentiable.

    Args:
        operator: public name, for messages.
        T: rows of x.
        E: experts of the bank.
        decision: the routing.

    Returns:
        [T, E] in the weights' dtype, without those of empty slots; None for a routing that is no table of ids, for no slots,
        and on a device that would have to be waited for.

    Raises:
        KernelError: sizes disagree, the ids are no integers or below -1, or the weights are not floating point.
    """
    ids_TK, weights, plan = decision
    if ids_TK is None or plan is not None or not ids_TK.is_cpu or not ids_TK.numel():
        return None
    check_decision(operator, T, E, decision)
    lowest, highest = check_bounds(operator, ids_TK)
    ids_TK = ids_TK.to(torch.int64)
    if lowest >= 0 and highest < E:
        return weights.new_zeros(T, E).scatter_add_(1, ids_TK, weights)
    # empty slots have a column of their own
    ids_TK = torch.where((ids_TK < 0) | (ids_TK >= E), E, ids_TK)
    return weights.new_zeros(T, E + 1).scatter_add_(1, ids_TK, weights)[:, :E]


def check_decision(operator: str, T: int, E: int, decision: Decision) -> None:
    """Check the sizes of a routing.

    Args:
        operator: public name, for messages.
        T: rows of x.
        E: experts of the bank.
        decision: the routing.

    Raises:
        KernelError: sizes disagree, the ids are no integers, the weights are not floating point, or the plan lives on
            another device than the weights.
    """
    ids, weights, plan = decision
    if ids is not None:
        check_ids(operator, ids)
    if not weights.is_floating_point():
        raise fail(operator, "dtype of the weights", weights.dtype, "float32", "Convert them: weights.float()")
    if plan is not None:
        check_plan_device(operator, weights.device, plan)
        if plan.num_tokens != T or plan.num_experts != E:
            got = f"for {plan.num_tokens} tokens and {plan.num_experts} experts"
            raise fail(operator, "the plan", got, f"{T} tokens and {E} experts", "Build the plan from this routing")
        if weights.numel() != plan.num_pairs:
            got = list(weights.shape)
            raise fail(operator, "shape of the weights", got, f"{plan.num_pairs} pairs", "Pass [T, K] or [P]")
    elif ids is None:
        check_shape(operator, "weights", weights, (T, E), "[T, E] when there are neither ids nor a plan")
    else:
        if ids.dim() != 2 or ids.shape[0] != T:
            raise fail(operator, "shape of expert_ids_TK", list(ids.shape), f"[{T}, K]", "One row of ids a row of x")
        if weights.shape != ids.shape:
            check_shape(operator, "weights_TK", weights, tuple(ids.shape), "that of expert_ids_TK")


def all_experts_plan(T: int, E: int, device: torch.device) -> RoutePlan:
    """Plan the routing in which every token has every expert, slot k = expert k.

    Args:
        T: tokens.
        E: experts.
        device: where the index tensors live.

    Returns:
        The plan with K = E.
    """
    return route_plan(torch.arange(E, device=device).expand(T, E), E)
