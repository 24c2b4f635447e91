"""`ModelRouting`: the routing state of one model, shared by all its routers, and the public ways to steer it.

It holds the context of the current forward pass and what the user asked for around it: extra inputs, recording,
replay, forced experts. It is plain Python state: it is not saved, not copied with its tensors, and knows nothing
about the model's library; hooks elsewhere open and close a forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.errors import RoutingError
from moe_kit.routing.balance import BalanceLoss, mean_loss, stack_routings
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.joined import joined
from moe_kit.routing.step import PassCounts

ATTRIBUTE = "moe_routing_state"


class ModelRouting:
    """State shared by the routers of one model.

    Attributes:
        context: the current or last forward pass.
        inputs: what `routing_inputs` added.
        record: site -> ids of the last forward while recording, else None.
        overrides: fields of the context set by replay and forcing.
        collapse_warned: sites whose collapse was logged.
        trained_losses: unscaled auxiliary losses of the last training pass by name.
        trained_terms: its (router, name, unscaled loss), as in the context.
        balances_globally: auxiliary losses are those of the joined batch of all processes.
    """

    def __init__(self) -> None:
        self.context = RoutingContext(is_open=False)
        self.inputs: dict[str, Any] = {}
        self.record: dict[str, Tensor] | None = None
        self.overrides: dict[str, Any] = {}
        self.collapse_warned: set[str] = set()
        self.trained_losses: dict[str, Tensor] = {}
        self.trained_terms: list[tuple[Any, str, Tensor]] = []
        self.balances_globally = False

    def __deepcopy__(self, memo: dict) -> ModelRouting:
        # a context holds graph tensors, which cannot be copied; a copied model starts without one
        memo[id(self)] = fresh = ModelRouting()
        return fresh

    def __reduce__(self) -> tuple:
        return (ModelRouting, ())

    def open(self, context: RoutingContext) -> None:
        """Start a forward pass."""
        self.impose(context)
        self.context = context

    def impose(self, context: RoutingContext) -> None:
        """Put what the user replays or forces into a context, and what it will count.

        Args:
            context: of a pass that starts.
        """
        for name, value in self.overrides.items():
            setattr(context, name, value)
        context.learns, context.counts = torch.is_grad_enabled(), PassCounts()
        if context.learns and any(router.training and not router.is_frozen for router, _, _ in self.trained_terms):
            # their graph holds activations that this pass may need the memory of
            self.trained_losses, self.trained_terms = {}, []

    def close(self, outputs: Sequence[Any] | None = ()) -> None:
        """End the forward pass: compute auxiliary losses, record ids, count, stop registering.

        Args:
            outputs: what the pass returned, tensors among other things; None = it died, and nothing of it counts.
        """
        context = self.context
        context.close()
        context.closed_losses, context.closed_terms = auxiliary_losses(context, self.balances_globally)
        if context.learns and any(router.training for _, _, router in context.registered):
            self.trained_losses, self.trained_terms = context.closed_losses, context.closed_terms
        if self.record is not None:
            self.record.update({site: routing.expert_ids_NK.detach() for site, routing, _ in context.registered})
        if outputs is not None and context.counts is not None:
            context.counts.commit(outputs)

    def total_loss(self) -> Tensor | None:
        """Sum of coefficient times loss over the last forward, or None if no router has a loss."""
        return _weighed(self.context.closed_terms)

    def trained_loss(self) -> Tensor | None:
        """Sum of coefficient times loss over the last training pass, or None without one or in evaluation mode."""
        return _weighed(self.trained_terms) if self.trains else None

    @property
    def trains(self) -> bool:
        """True if routers of the last training pass are in training mode still."""
        return any(router.training for router, _, _ in self.trained_terms)


def _weighed(terms: Sequence[tuple[Any, str, Tensor]]) -> Tensor | None:
    weighed = [(router.coefficient(name), loss) for router, name, loss in terms]
    products = [factor * loss for factor, loss in weighed if isinstance(factor, Tensor) or factor]
    return torch.stack(products).sum() if products else None


def auxiliary_losses(
    context: RoutingContext, across: bool = False
) -> tuple[dict[str, Tensor], list[tuple[Any, str, Tensor]]]:
    """Unscaled auxiliary losses of the routers registered in a pass.

    Args:
        context: a pass.
        across: balance the joined batch of all processes.

    Returns:
        name -> scalar, averaged over all sites, and (router, name, scalar) averaged over the sites of each group of
        routers, whose coefficients and losses are those of that router. Names are those of `Router.losses`.
    """
    wanted: dict[tuple[str, str], tuple[Any, BalanceLoss, list]] = {}
    for _, routing, router in context.registered:
        if router.training:
            for name, (_, loss) in router.losses.items():
                wanted.setdefault((router.group, name), (router, loss, []))[2].append(routing)
    stacks: dict[tuple[int, ...], list] = {}
    terms, by_name = [], defaultdict(list)
    for (_, name), (router, loss, routings) in wanted.items():
        key = tuple(id(routing) for routing in routings)
        if key not in stacks:
            types = context.scalars.get("task_types") if context.scalars else None
            stacks[key] = [joined(stack) if across else stack for stack in stack_routings(routings, types)]
        terms.append((router, name, mean_loss(loss, stacks[key])))
        by_name[name].append((len(routings), terms[-1][2]))
    losses = {}
    for name, parts in by_name.items():
        sites = sum(count for count, _ in parts)
        losses[name] = parts[0][1] if len(parts) == 1 else torch.stack([n / sites * loss for n, loss in parts]).sum()
    return losses, terms


def find_routing_state(model: nn.Module) -> ModelRouting | None:
    """The routing state attached to a model or to a module inside it, or None."""
    for module in model.modules():
        state = module.__dict__.get(ATTRIBUTE)
        if state is not None:
            return state
    return None


def require_routing_state(model: nn.Module) -> ModelRouting:
    """Like `find_routing_state`.

    Raises:
        RoutingError: if the model has no routers of moe_kit.
    """
    state = find_routing_state(model)
    if state is None:
        raise RoutingError("this model has no moe_kit routers: wrap it with get_peft_model(model, config) first.")
    return state


@contextmanager
def routing_inputs(
    model: nn.Module,
    *,
    task_ids: Tensor | Sequence[int] | None = None,
    prior: Tensor | None = None,
    prompt_length: int | Tensor | None = None,
    prompt_mask: Tensor | None = None,
    **scalars: Tensor | float,
) -> Iterator[None]:
    """Give routers more than the hidden states, in `forward`, `generate`, PEFT and native models alike.

    Args:
        model: a model with moe_kit routers, wrapped or native.
        task_ids: int [B], for task-scope routers.
        prior: float [B, E], added to every router's logits.
        prompt_length: tokens of the prompt, an int for all rows or int [B]; sequence-scope decisions read only these.
        prompt_mask: bool [B, S], the same as a mask; it wins over `prompt_length`.
        **scalars: named values per row (mask_ratio, step), float or tensor [B]. `task_types`, 0 or 1 for each row or
            one for all, is what the loss 'cv_typed' balances by.

    Raises:
        RoutingError: if the model has no moe_kit routers.

    Example:
        `with routing_inputs(model, task_ids=[0, 2]): model.generate(**batch)`
    """
    state = require_routing_state(model)
    given: dict[str, Any] = {
        "task_ids": None if task_ids is None else torch.as_tensor(task_ids, dtype=torch.long),
        "prior": prior,
        "prompt_length": prompt_length,
        "prompt_mask": prompt_mask,
        # an inner block adds to the scalars of an outer one
        "scalars": {**state.inputs.get("scalars", {}), **scalars} or None,
    }
    previous = state.inputs
    state.inputs = {**previous, **{name: value for name, value in given.items() if value is not None}}
    try:
        yield
    finally:
        state.inputs = previous


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record which experts every router of a model chose.

    Args:
        model: a model with moe_kit routers.

    Yields:
        dict site name -> int64 ids [N, K] of the last forward pass, filled as passes end.

    Raises:
        RoutingError: if the model has no moe_kit routers.
    """
    state = require_routing_state(model)
    previous, state.record = state.record, {}
    try:
        yield state.record
    finally:
        state.record = previous


@contextmanager
def replay_routing(model: nn.Module, record: Mapping[str, Tensor]) -> Iterator[None]:
    """Force every router to the index sets of a record; the weights are computed anew and keep their gradient.

    The ids stay with the context of each forward pass, so a backward pass may run after the block has ended.

    Args:
        model: a model with moe_kit routers.
        record: site name -> int64 ids [N, K], from `record_routing` on the same batch.

    Raises:
        RoutingError: at the forward pass, if ids are outside [-1, E) or do not fit the batch.
    """
    state = require_routing_state(model)
    with _override(state, replay=dict(record)):
        yield


@contextmanager
def force_experts(
    model: nn.Module,
    ids_BK: Tensor | Sequence[Sequence[int]] | None = None,
    weights_BE: Tensor | Sequence[Sequence[float]] | None = None,
    sites: Sequence[str] | None = None,
) -> Iterator[None]:
    """Force the same experts for all decisions of a row, at all routers or some.

    Args:
        model: a model with moe_kit routers.
        ids_BK: int64 [B or 1, K], experts for each row, a tensor or nested lists; weights stay the router's own.
        weights_BE: float [B or 1, E], weights for each row; exactly one of the two is given.
        sites: names of the sites that obey; None = all.

    Raises:
        RoutingError: if none or both of ids and weights are given, they have another shape or type, a site is unknown,
            or the model has no moe_kit routers.
    """
    if (ids_BK is None) == (weights_BE is None):
        raise RoutingError("force_experts needs either ids_BK or weights_BE, not both and not none.")
    state = require_routing_state(model)
    name, given = ("ids_BK", ids_BK) if weights_BE is None else ("weights_BE", weights_BE)
    rows = torch.as_tensor(given)
    if rows.dim() != 2:
        raise RoutingError(f"{name} has shape {list(rows.shape)}, expected one row for each batch row: [B or 1, ...].")
    if ids_BK is not None and (rows.is_floating_point() or rows.dtype == torch.bool):
        raise RoutingError(f"{name} has dtype {rows.dtype}, expected whole numbers: pass weights as weights_BE.")
    ids_BK, weights_BE = (rows.long(), None) if weights_BE is None else (None, rows.float())
    chosen = None if sites is None else frozenset(sites)
    known = {module.site for module in model.modules() if hasattr(module, "site")}
    if chosen is not None and chosen - known:
        raise RoutingError(
            f"force_experts names {min(chosen - known)!r}, which is no site of this model: take names from record_routing."
        )
    with _override(state, forced_ids_BK=ids_BK, forced_weights_BE=weights_BE, forced_sites=chosen):
        yield


@contextmanager
def policy_gradient(model: nn.Module) -> Iterator[ModelRouting]:
    """Announce that sampled routers are trained by a policy gradient inside this block.

    Without it a training forward of a sampled, unfrozen router raises, since no other loss reaches that router.
    Log-probabilities then keep their gradient in forward-only passes as well.

    Args:
        model: a model with moe_kit routers.

    Yields:
        The routing state; `state.context.registered` holds the decisions of the last pass.
    """
    state = require_routing_state(model)
    with _override(state, policy_gradient=True):
        yield state


@contextmanager
def _override(state: ModelRouting, **fields: Any) -> Iterator[None]:
    previous = state.overrides
    state.overrides = {**previous, **fields}
    try:
        yield
    finally:
        state.overrides = previous


def routing_losses(model: nn.Module) -> dict[str, Tensor]:
    """Unscaled auxiliary losses of the last training pass; passes without gradients in between change nothing.

    Args:
        model: a model with moe_kit routers.

    Returns:
        name -> scalar with gradient; empty in evaluation mode or before the first training pass.

    Raises:
        RoutingError: if the model has no moe_kit routers.
    """
    state = require_routing_state(model)
    return dict(state.trained_losses) if state.trains else {}


def weighted_routing_loss(model: nn.Module) -> Tensor:
    """Auxiliary losses of the last training pass times their coefficients, for a training loop with a loss of its own.

    A pass trains if it runs in training mode with gradients on; others, of a reference policy say, change nothing.

    Args:
        model: a model with moe_kit routers, called in training mode.

    Returns:
        Scalar with gradient, 0 if no router has a loss or in evaluation mode. A loop that accumulates micro-batches multiplies it by the
        share of the step's label tokens (or of its micro-batches) that this pass holds.

    Raises:
        RoutingError: if the model has no moe_kit routers.
    """
    total = require_routing_state(model).trained_loss()
    return torch.zeros((), device=next(model.parameters()).device) if total is None else total
