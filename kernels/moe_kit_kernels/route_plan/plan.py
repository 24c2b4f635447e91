"""The routing plan: one routing decision, in every order that a kernel may want it.

A routing is a list of P (token, expert) pairs. From it follow, each computed when first read and then kept:

    counts_E[e]   = |{p : expert(p) = e}|
    offsets_E1[e] = sum_{e' < e} counts_E[e']
    order_P       = the pairs by expert, pairs of one expert in their given order, dropped pairs last
    inverse_P     = order_P^-1

Every shape follows from T, K, P and E alone, never from the routing, and nothing waits for the device: a plan built
again in recomputation has the same shapes, and compile or CUDA graphs see static sizes. A dense kernel reads none of
the sorted pieces, so it does not pay for them.

Legend: T tokens, K slots a token, P pairs (T*K for token choice), E experts.

On a GPU three launches of `triton.py` make all sorted pieces at once, also those of each slot of a table; on a CPU one call of
`native.cpp` does where it runs.

Sources: stable sort by expert as in MegaBlocks (arXiv 2211.15841); a tile map without padded memory as in SonicMoE
(arXiv 2512.14080). It is not a dispatch: no row of any activation moves here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kit_kernels.common.cached import cached
from moe_kit_kernels.common.checks import check_device, fail
from moe_kit_kernels.common.device import has_triton
from moe_kit_kernels.route_plan import native

MAX_EXPERTS = 1023
"""E of the planning kernels at most: a program holds a number for each expert."""


def on_kernels(plan: RoutePlan) -> bool:
    """Tell whether the planning kernels serve a plan.

    Args:
        plan: the routing.

    Returns:
        True on a GPU with Triton installed, up to `MAX_EXPERTS` experts and 2^31 pairs; False inside a trace.
    """
    sizes = plan.num_experts <= MAX_EXPERTS and plan.num_pairs < 2**31
    return plan.device.type == "cuda" and sizes and not torch.compiler.is_compiling() and has_triton()


def _sorted_piece(function: Callable[[RoutePlan], Tensor]) -> cached[Tensor]:
    """A cached property that the kernels or the C++ make where they serve, together with all others of its kind."""

    @functools.wraps(function)
    def piece(plan: RoutePlan) -> Tensor:
        if on_kernels(plan):
            return plan._sort(function.__name__)
        if native.serves(plan):
            # a piece that was read already stays the tensor that it was
            plan.__dict__.update({**native.sort_pairs(plan), **plan.__dict__})
            return plan.__dict__[function.__name__]
        return function(plan)

    return cached(piece)


@dataclass(frozen=True, eq=False)
class RoutePlan:
    """One routing, as flat pairs plus the derived orders; build it with `route_plan` or `route_plan_pairs`.

    Index tensors are int64 on the device of the ids. "Dropped" pairs are empty slots (expert -1 or >= E); they keep
    their place in every `_P` array so that shapes stay static, and carry the expert number E.
    """

    expert_P: Tensor
    """[P] expert of each pair in the given order, in [0, E]; E means dropped."""
    num_tokens: int
    """T, rows of x and of the result."""
    num_experts: int
    """E."""
    slots: int | None
    """K when the pairs are the rows of a [T, K] table of ids, in that order; None for free pairs."""
    free_token_P: Tensor | None = None
    """[P] token of each free pair, in [0, T); None for a table. Read `token_P`."""

    def __getstate__(self) -> dict[str, Any]:
        # what C++ was told holds addresses, which mean nothing elsewhere
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_native")}

    @property
    def num_pairs(self) -> int:
        """P, dropped pairs included."""
        return self.expert_P.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the index tensors."""
        return self.expert_P.device

    @cached
    def token_P(self) -> Tensor:
        """[P] int64 token of each pair in the given order, in [0, T)."""
        if self.free_token_P is not None:
            return self.free_token_P
        T, K = self.num_tokens, self.slots
        return torch.arange(T, device=self.device).view(T, 1).expand(T, K).reshape(-1)

    def _sort(self, piece: str) -> Any:
        """Run the kernels, keep all that they make, and return one piece of it."""
        from moe_kit_kernels.route_plan.triton import sort_pairs

        slots = 1 if self.slots is None else max(1, self.slots)
        own, *each = sort_pairs(self.expert_P.contiguous(), self.free_token_P, slots, self.num_experts)
        self.__dict__.update(own)
        if each:
            self.__dict__["slot_plans"] = parts = self._by_slot()
            for part, pieces in zip(parts, each, strict=True):
                part.__dict__.update(pieces)
        return self.__dict__[piece]

    def _by_slot(self) -> list[RoutePlan]:
        ids_TK = self.expert_P.view(self.num_tokens, self.slots)
        return [RoutePlan(expert_T, self.num_tokens, self.num_experts, 1) for expert_T in ids_TK.unbind(1)]

    @cached
    def slot_plans(self) -> list[RoutePlan]:
        """K plans over T pairs each: within a slot of a table a token occurs once, so adding to its row races with nobody."""
        assert self.slots is not None, "free pairs have no slots"
        if self.slots == 1:
            return [self]
        return self._sort("slot_plans") if self.slots and on_kernels(self) else self._by_slot()

    @_sorted_piece
    def counts_E(self) -> Tensor:
        """[E] int64 pairs of each expert, dropped pairs left out."""
        ones = torch.ones_like(self.expert_P)
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=self.device)
        return counts.scatter_add_(0, self.expert_P, ones)[: self.num_experts]

    @_sorted_piece
    def offsets_E1(self) -> Tensor:
        """[E + 1] int64 first sorted position of each expert; the last entry is the number of pairs not dropped."""
        offsets = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(self.counts_E, 0, out=offsets[1:])
        return offsets

    @cached
    def ends_E(self) -> Tensor:
        """[E] int32 end of each expert's run in the sorted order: the `offs` that `torch` grouped_mm takes."""
        return self.offsets_E1[1:].to(torch.int32)

    @_sorted_piece
    def order_P(self) -> Tensor:
        """[P] int64 given positions in sorted order: by expert, stable, dropped pairs last."""
        # a narrow key sorts faster (radix passes on CUDA, less traffic on CPU)
        narrow = torch.int16 if self.num_experts < 2**15 else torch.int32
        return torch.sort(self.expert_P.to(narrow), stable=True).indices

    @_sorted_piece
    def inverse_P(self) -> Tensor:
        """[P] int64 sorted position of each given pair: `inverse_P[order_P] = arange(P)`."""
        positions = torch.arange(self.num_pairs, device=self.device)
        return torch.zeros_like(self.order_P).scatter_(0, self.order_P, positions)

    @_sorted_piece
    def sorted_token_P(self) -> Tensor:
        """[P] int64 token of each pair in sorted order."""
        return self.token_P.index_select(0, self.order_P)

    @_sorted_piece
    def sorted_expert_P(self) -> Tensor:
        """[P] int64 expert of each pair in sorted order; E for dropped pairs."""
        return self.expert_P.index_select(0, self.order_P)

    @cached
    def gate_index_P(self) -> Tensor:
        """[P] int64 position of each pair in a flat [T, E + 1] table whose last column takes the dropped pairs."""
        return self.token_P * (self.num_experts + 1) + self.expert_P

    @cached
    def token_order_P(self) -> Tensor:
        """[P] int64 given positions by token, stable. The identity when the pairs come from a [T, K] table."""
        if self.slots is not None:
            return torch.arange(self.num_pairs, device=self.device)
        return torch.sort(self.token_P, stable=True).indices

    @cached
    def token_offsets_T1(self) -> Tensor:
        """[T + 1] int64 first position of each token in `token_order_P` (dropped pairs included)."""
        if self.slots is not None:
            return torch.arange(self.num_tokens + 1, device=self.device) * self.slots
        counts = torch.zeros(self.num_tokens, dtype=torch.int64, device=self.device)
        counts.scatter_add_(0, self.token_P, torch.ones_like(self.token_P))
        offsets = torch.zeros(self.num_tokens + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return offsets

    @cached
    def host_offsets(self) -> list[int]:
        """`offsets_E1` as Python integers, for loops on the CPU.

        Raises:
            AssertionError: the plan lives on an accelerator, where this would wait for the device.
        """
        assert self.device.type == "cpu", "host_offsets waits for the device"
        return self.offsets_E1.tolist()

    def dense_TE(self, weights_P: Tensor) -> Tensor:
        """Weights as a dense table, differentiable.

        Args:
            weights_P: weight of each pair in the given order, [P] or [T, K].

        Returns:
            [T, E]; 0 where an expert is not chosen; weights of repeated pairs add up.
        """
        return self.gates_TE1(weights_P)[:, :-1]

    def gates_TE1(self, weights_P: Tensor) -> Tensor:
        """Weights as a dense table with one more column, differentiable.

        Args:
            weights_P: weight of each pair in the given order, [P] or [T, K].

        Returns:
            [T, E + 1]; the last column is the sum of the dropped pairs' weights.
        """
        width = self.num_experts + 1
        if self.slots is not None:
            shape = (self.num_tokens, self.slots)
            table = weights_P.new_zeros(self.num_tokens, width)
            return table.scatter_add_(1, self.expert_P.view(shape), weights_P.reshape(shape))
        flat = weights_P.new_zeros(self.num_tokens * width)
        return flat.scatter_add_(0, self.gate_index_P, weights_P.reshape(-1)).view(-1, width)


def check_plan_device(operator: str, device: torch.device, plan: RoutePlan) -> None:
    """Check that a plan lives where the other arguments do.

    Args:
        operator: public name, for messages.
        device: the device of the first argument.
        plan: the routing.

    Raises:
        KernelError: its index tensors live elsewhere.
    """
    if plan.expert_P.device != device:
        got, fix = plan.expert_P.device, f"Build the plan from ids on {device}"
        raise fail(operator, "device of the plan", got, f"{device}", fix)


def check_ids(operator: str, ids: Tensor) -> None:
    """Check the dtype of expert ids.

    Args:
        operator: public name, for messages.
        ids: the ids, of any shape.

    Raises:
        KernelError: not an integer dtype.
    """
    # one comparison where decoding passes by
    if ids.dtype is torch.int64:
        return
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise fail(operator, "dtype of the expert ids", ids.dtype, "an integer dtype", "Convert them: ids.long()")


def check_bounds(operator: str, ids: Tensor) -> tuple[int, int]:
    """Find the smallest and the largest id, which waits for the device.

    Args:
        operator: public name, for messages.
        ids: integer ids, one or more.

    Returns:
        Both; any id outside of [0, E) is an empty slot.

    Raises:
        KernelError: an id below -1.
    """
    if ids.numel() <= 64:
        # a short list is looked through in Python sooner than by a reduction
        listed = ids.reshape(-1).tolist()
        lowest, highest = min(listed), max(listed)
    else:
        lowest, highest = (int(bound) for bound in torch.aminmax(ids))
    if lowest < -1:
        raise fail(operator, "the smallest expert id", lowest, "-1 or more", "Mark empty slots with -1")
    return lowest, highest


def _clean_ids(operator: str, ids: Tensor, num_experts: int) -> Tensor:
    """Check ids and map dropped ones to E; where reading values costs no wait, ids in range are taken as they are."""
    check_ids(operator, ids)
    if num_experts < 1:
        raise fail(operator, "num_experts", num_experts, "at least 1", "Pass the size of the expert bank")
    ids = ids.to(torch.int64)
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        lowest, highest = check_bounds(operator, ids)
        if lowest >= 0 and highest < num_experts:
            return ids
    return torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)


def route_plan(expert_ids_TK: Tensor, num_experts: int) -> RoutePlan:
    """Plan a token-choice routing: every token names K slots.

    Args:
        expert_ids_TK: [T, K] integer ids. -1 and ids >= num_experts are empty slots.
        num_experts: E, at least 1.

    Returns:
        The plan; pair p = t*K + k.

    Raises:
        KernelError: not a 2-D integer tensor; num_experts < 1; an id below -1 (looked at on the CPU only, where it
            costs no wait).

    Example:
        >>> plan = route_plan(torch.tensor([[2, 0], [0, -1]]), 3)
        >>> plan.counts_E.tolist(), plan.order_P.tolist()
        ([2, 0, 1], [1, 2, 0, 3])
    """
    if expert_ids_TK.dim() != 2:
        raise fail("route_plan", "shape of expert_ids_TK", list(expert_ids_TK.shape), "[T, K]", "Reshape it")
    T, K = expert_ids_TK.shape
    return RoutePlan(_clean_ids("route_plan", expert_ids_TK.reshape(-1), num_experts), T, num_experts, K)


def route_plan_pairs(token_P: Tensor, expert_P: Tensor, num_tokens: int, num_experts: int) -> RoutePlan:
    """Plan a routing given as free pairs: expert choice, token rounding, any variable number of experts a token.

    Args:
        token_P: [P] integer token of each pair; a pair whose token is outside [0, num_tokens) is dropped.
        expert_P: [P] integer expert of each pair. -1 and ids >= num_experts are dropped.
        num_tokens: T, at least 0.
        num_experts: E, at least 1.

    Returns:
        The plan, with `slots` None; pairs keep their given order.

    Raises:
        KernelError: not two 1-D integer tensors of one length on one device; num_experts < 1; an expert id below -1
            (CPU only).
    """
    if token_P.dim() != 1 or token_P.shape != expert_P.shape:
        got = f"{list(token_P.shape)} and {list(expert_P.shape)}"
        raise fail("route_plan_pairs", "shapes of token_P, expert_P", got, "[P] and [P]", "Flatten the pairs")
    if token_P.is_floating_point() or token_P.is_complex() or token_P.dtype == torch.bool:
        raise fail("route_plan_pairs", "dtype of token_P", token_P.dtype, "an integer dtype", "Convert it")
    check_device("route_plan_pairs", token_P.device, expert_P=expert_P)
    expert_P = _clean_ids("route_plan_pairs", expert_P, num_experts)
    token_P = token_P.to(torch.int64)
    outside = (token_P < 0) | (token_P >= num_tokens)
    expert_P = torch.where(outside, num_experts, expert_P)
    return RoutePlan(expert_P, num_tokens, num_experts, None, torch.where(outside, 0, token_P))
