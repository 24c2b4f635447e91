"""What a routing decision may know besides its input `x`.

A `RoutingContext` belongs to one forward pass of a model, or of a part of it that sees other tokens (a tower, an
encoder). Recomputation under gradient checkpointing reads it again while the backward pass runs, so it lives as long
as the graph of its pass. Contexts of one pass share what the pass collects.

Shapes: B batch rows, S sequence, T = B*S tokens, E experts, N decisions.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from moe_kit.errors import RoutingError

if TYPE_CHECKING:
    from moe_kit.routing.decision import Routing
    from moe_kit.routing.step import PassCounts


class InputIdentity:
    """Tells whether a tensor is the input seen before: the same object, or the same numbers in memory, unchanged.

    Hooks of a module (those of sharded training among them) may hand on a view of its input.

    Args:
        x: the input; it is not kept alive.
    """

    __slots__ = ("_address", "_object", "_storage", "_version")

    def __init__(self, x: Tensor) -> None:
        self._address = self._storage = self._version = None
        if torch.compiler.is_compiling():
            # a compiled graph can trace neither weak references nor addresses
            self._object = lambda: x
            return
        self._object = weakref.ref(x)
        self._version = _version(x)
        # what a hook made is gone before the next layer asks; of others the object is still there to be compared with
        if x._is_view() or x.is_inference():
            self._address = _address(x)
            # keeps the address from being given to another tensor, not the memory
            self._storage = None if self._address is None else StorageWeakRef(x.untyped_storage())

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is that input.

        Args:
            x: any tensor.
        """
        before = self._object()
        if torch.compiler.is_compiling() or before is x:
            return before is x and self._version == _version(x)
        if before is not None:
            address = _address(before)
        else:
            address = None if self._storage is None or self._storage.expired() else self._address
        return address is not None and address == _address(x) and self._version == _version(x)


def _version(x: Tensor) -> int | None:
    """Number of changes in place; None where torch does not count them."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _address(x: Tensor) -> tuple | None:
    """Where the numbers of a tensor lie, and in which form; None where that cannot be told."""
    if type(x) not in (Tensor, nn.Parameter):
        # the memory of a subclass (sharded, fake) is not where its numbers are
        return None
    try:
        return (x.data_ptr(), x.untyped_storage()._cdata, x.shape, x.stride(), x.dtype)
    except (RuntimeError, NotImplementedError):
        # a tensor without memory, as under a transform of torch.func
        return None


@dataclass(slots=True)
class SharedInput:
    """What layers that read one input have in common in a pass.

    Attributes:
        input: the input.
        routing: the decision about it.
        mode: (whether the pass was open, whether there was a graph) when it was made.
        outputs: outputs computed along with the first layer's, by module path; each is taken once.
    """

    input: InputIdentity
    routing: Routing
    mode: tuple[bool, bool]
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def serves(self, x: Tensor, mode: tuple[bool, bool]) -> bool:
        """Whether a layer with this input, in this mode, may read it.

        An encoder's output is the same tensor in recomputation, which must still decide anew: it saves what the first
        run saved. And what was computed without a graph is of no use to a layer that needs one.

        Args:
            x: the layer's input.
            mode: as in the attributes.
        """
        return self.mode == mode and self.input.is_of(x)


@dataclass
class RoutingContext:
    """Facts about one forward pass, shared by all routers of a model.

    Attributes:
        mask_BS: bool [B, S], True for real tokens; None = all real.
        prompt_mask_BS: bool [B, S], True for tokens a sequence-scope decision may read; None = `mask_BS`.
        shape_BS: (B, S) of the pass's tokens; None = not known. It tells the rows of a flattened input.
        rows_known: rows are those of the batch, so values given for each row mean these; False in a tower, which may see
            any number of images for a row.
        lengths: tokens of each image or clip where a tower sees them in one row; None = one a row.
        shortens: `mask_BS` is that of an input which the part shortens in time (sound), so a layer sees every n-th of it.
        reduce_mask: gives the mask [B, S'] of a shortened input from (S', mask of the input); None = every n-th entry.
        sequences_known: False where tokens of several sequences lie in one row and nothing tells them apart.
        sequence_BS: int64 [B, S], which sequence a token belongs to when rows are packed, numbered over the whole
            batch; None = one sequence a row.
        num_sequences: number of sequences in `sequence_BS`; None = number of rows.
        task_ids_B: int64 [B], the task of each row, for task-scope routers.
        prior_BE: float [B, E], added to the logits of every token of a row (a task similarity, say).
        scalars: named values per row (float or tensor [B]): mask ratio, denoising step, training progress.
        replay: site name -> expert ids [N, K] to obey instead of choosing; weights stay live.
        forced_ids_BK: expert ids for every row at every site (`force_experts`).
        forced_weights_BE: expert weights for every row at every site (`force_experts`).
        forced_sites: sites that obey the forced values; None = all.
        routings: site name -> the `Routing` made last in this pass.
        shared: site name -> what layers with the same input read.
        spent: site name -> module paths that have read its entry in `shared` since the pass ended.
        deciders: site name -> module path of the layer whose input a router shared by a block or the model read.
        registered: every Routing registered in this pass, as (site, routing, router).
        carried: site name -> float32 logits [B, E] of decisions that outlive the prompt (sequence and request scope).
            A hook gives an empty dict when a cache starts, keeps what the routers put in, and gives it back while
            decoding, when routers obey it. None = nothing outlives this pass.
        policy_gradient: True while a policy-gradient trainer runs the model: sampled decisions keep the gradient of
            their log-probability even in forward-only passes.
        learns: gradients were on when the pass of the model began (reentrant checkpointing runs its layers without); None
            = a router is used on its own, and torch tells.
        counts: what step states measured in this pass; None = a router is used on its own, and it counts at once.
        is_open: True while the forward runs; a recomputation during backward finds it False and registers nothing.
        closed_losses: unscaled auxiliary losses by name, filled when the forward ends.
        closed_terms: (router, name, unscaled loss), one for each loss of each group of routers, filled as well.
        tokens: (rows, columns, device) -> what `tokens_of` gives, made once for all routers.
        views: the other contexts of the pass.
        others: (rows, columns, whether flattened) -> the view for such an input, made once.
        rows_seen: rows of the last input with rows and columns, where `shape_BS` is not known.
    """

    mask_BS: Tensor | None = None
    prompt_mask_BS: Tensor | None = None
    shape_BS: tuple[int, int] | None = None
    rows_known: bool = True
    lengths: tuple[int, ...] | None = None
    shortens: bool = False
    reduce_mask: Callable[[int, Tensor], Tensor] | None = None
    sequences_known: bool = True
    sequence_BS: Tensor | None = None
    num_sequences: int | None = None
    task_ids_B: Tensor | None = None
    prior_BE: Tensor | None = None
    scalars: dict[str, Tensor | float] = field(default_factory=dict)
    replay: dict[str, Tensor] | None = None
    forced_ids_BK: Tensor | None = None
    forced_weights_BE: Tensor | None = None
    forced_sites: frozenset[str] | None = None
    routings: dict[str, Routing] = field(default_factory=dict)
    shared: dict[str, SharedInput] = field(default_factory=dict)
    spent: dict[str, set[str]] = field(default_factory=dict)
    deciders: dict[str, str] = field(default_factory=dict)
    registered: list[tuple[str, Routing, torch.nn.Module]] = field(default_factory=list)
    carried: dict[str, Tensor] | None = None
    policy_gradient: bool = False
    learns: bool | None = None
    counts: PassCounts | None = None
    is_open: bool = True
    closed_losses: dict[str, Tensor] = field(default_factory=dict)
    closed_terms: list[tuple[Any, str, Tensor]] = field(default_factory=list)
    views: list[RoutingContext] = field(default_factory=list)
    # not taken over by `dataclasses.replace`: another view of a pass has other tokens
    others: dict[tuple[int, int, bool], RoutingContext] = field(default_factory=dict, init=False)
    rows_seen: int | None = field(default=None, init=False)
    tokens: dict[tuple[int, int, torch.device], tuple[Tensor, int, Tensor | None]] = field(
        default_factory=dict, init=False
    )

    def derive(self, **changes: Any) -> RoutingContext:
        """Another context of this pass, for other tokens.

        Args:
            **changes: fields that differ.

        Returns:
            A context that shares what the pass collects, and is closed with it.
        """
        view = replace(self, **changes)
        self.views.append(view)
        return view

    def of_tokens(
        self, shape_BS: tuple[int, int] | None, mask_BS: Tensor | None = None, **changes: Any
    ) -> RoutingContext:
        """A context of this pass for tokens that have nothing to do with these: another side, a tower, a memory.

        Args:
            shape_BS: their rows and columns; None = not known.
            mask_BS: bool [B, S], which are real; None = all.
            **changes: fields that differ besides; nothing is known of their prompt and their documents.

        Returns:
            As `derive`.
        """
        unknown = dict.fromkeys(("prompt_mask_BS", "sequence_BS", "num_sequences"))
        return self.derive(**{**unknown, "shape_BS": shape_BS, "mask_BS": mask_BS, **changes})

    def close(self) -> None:
        """End the pass: its routers register nothing more."""
        for context in (self, *self.views):
            context.is_open = False

    def for_recomputation(self) -> RoutingContext:
        """What recomputation reads of this pass: its tokens, and shared decisions, none of them with a graph."""
        shared = {site: self.routings[site].without_graph() for site in self.deciders if site in self.routings}
        return replace(
            self,
            is_open=False,
            routings=shared,
            deciders=dict(self.deciders),
            shared={},
            spent={},
            registered=[],
            closed_losses={},
            closed_terms=[],
            views=[],
            counts=None,
        )

    def fitting(self, x: Tensor) -> RoutingContext:
        """The context for the input of a layer, which may see other tokens than its model was given.

        Args:
            x: float [..., D], the layer's input.

        Returns:
            This context, or a view of it: a pooled state is one token of each row, flattened tokens of a tower are the
            images of `lengths`, a shortened input has a shortened mask, and a head may see the last columns only. Where
            nothing is known about tokens, all are real.
        """
        shape = self.shape_BS
        if x.dim() > 2:
            batch, length = x.shape[0], x.shape[1] if x.dim() == 3 else math.prod(x.shape[1:-1])
            if shape is None:
                self.rows_seen = batch
                return self if self.mask_BS is None and self.lengths is None else self._other(batch, length)
            return self if batch == shape[0] and length == shape[1] else self._other(batch, length)
        if x.dim() < 2:
            return self
        rows = x.shape[0]
        if shape is not None:
            if rows == shape[0] * shape[1]:
                return self
            return self._other(rows, 1) if rows == shape[0] else self._other(1, rows, flat=True)
        if rows == self.rows_seen:
            return self._other(rows, 1)
        # a module that no hook told about its tokens takes them as they are
        return self if self.rows_known and self.mask_BS is None else self._other(1, rows, flat=True)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the rows and columns of an input are those that this context is about.

        Args:
            shape: (rows, columns).
        """
        if self.shape_BS is not None:
            return tuple(shape) == tuple(self.shape_BS)
        return self.rows_seen == shape[0]

    def _other(self, batch: int, length: int, flat: bool = False) -> RoutingContext:
        if torch.compiler.is_compiling():
            return self._view(batch, length, flat)
        key = (batch, length, flat)
        if key not in self.others:
            self.others[key] = self._view(batch, length, flat)
        return self.others[key]

    def _view(self, batch: int, length: int, flat: bool) -> RoutingContext:
        given = self.shape_BS if self.shape_BS is not None else None if self.mask_BS is None else self.mask_BS.shape
        own = given is not None and given[0] == batch and not flat
        changes: dict[str, Any] = {"rows_known": self.rows_known and (own or given is None)}
        if own and self.shortens:
            changes["mask_BS"] = None if self.mask_BS is None else self._reduced(self.mask_BS, length)
        elif own and 1 < length < given[1]:
            for name in ("mask_BS", "prompt_mask_BS", "sequence_BS"):
                value = getattr(self, name)
                changes[name] = None if value is None else value[:, given[1] - length :]
            changes["num_sequences"] = self.num_sequences
        elif batch == 1 and self.lengths is not None:
            changes["sequence_BS"], changes["num_sequences"] = _of_lengths(self.lengths, length)
            changes["sequences_known"] = changes["sequence_BS"] is not None or len(self.lengths) == 1
        elif flat:
            changes["sequences_known"] = False
        elif given is not None and batch == 1 != given[0]:
            return self.of_table(length)
        return self.of_tokens((batch, length), **changes)

    def of_table(self, length: int) -> RoutingContext:
        """The context for a table without a batch, as of relative positions, that goes through a layer of tokens.

        Its rows are no tokens: they count in no load and no loss, and a decision about a sequence is not theirs.

        Args:
            length: rows of the table.
        """
        return self.of_tokens((1, length), rows_known=False, carried=None, is_open=False)

    def _reduced(self, mask_BS: Tensor, length: int) -> Tensor | None:
        """The mask of an input that a tower has shortened in time."""
        columns = mask_BS.shape[1]
        if columns == length:
            return mask_BS
        if self.reduce_mask is not None:
            return self.reduce_mask(length, mask_BS.long()).bool()
        step = round(columns / length)
        reduced = mask_BS[:, ::step]
        return reduced if reduced.shape[1] == length else None

    @property
    def is_free(self) -> bool:
        """Nothing given from outside takes part in a choice: no prior, no replayed or forced experts."""
        return (
            self.prior_BE is None
            and self.replay is None
            and self.forced_ids_BK is None
            and self.forced_weights_BE is None
        )

    @property
    def counts_states(self) -> bool:
        """Whether step states count in this pass: something is trained by it, if only by a policy gradient."""
        return self.policy_gradient or (torch.is_grad_enabled() if self.learns is None else self.learns)

    def mask_T(self, batch: int, length: int) -> Tensor | None:
        """Real tokens of an input with `batch` rows and `length` columns, flattened.

        Args:
            batch: rows of the input, 1 or more.
            length: columns of the input; fewer than the mask's means the last ones (a head that sees only them).

        Returns:
            bool [batch * length], or None when every token is real.

        Raises:
            RoutingError: if the mask does not fit the input.
        """
        return _crop(self.mask_BS, batch, length, "attention mask")

    def prompt_mask_T(self, batch: int, length: int) -> Tensor | None:
        """Tokens that a sequence-scope decision may read, as `mask_T`."""
        if self.prompt_mask_BS is None:
            return self.mask_T(batch, length)
        return _crop(self.prompt_mask_BS, batch, length, "prompt mask")

    def sequence_T(self, batch: int, length: int, device: torch.device) -> tuple[Tensor, int]:
        """Sequence index of each token and the number of sequences.

        Returns:
            (int64 [batch * length], count). One sequence a row unless rows are packed.
        """
        if self.sequence_BS is None:
            rows = torch.arange(batch, device=device)
            return rows.repeat_interleave(length, output_size=batch * length), batch
        cropped = _crop(self.sequence_BS, batch, length, "sequence index")
        assert cropped is not None
        assert self.num_sequences is not None
        return cropped.to(device), self.num_sequences

    def tokens_of(self, batch: int, length: int, device: torch.device) -> tuple[Tensor, int, Tensor | None]:
        """Sequence of each token, number of sequences, and mask of each token.

        Args:
            batch: rows of the input.
            length: columns of the input.
            device: where the index lives.

        Returns:
            As `sequence_T` and `mask_T`; asked by every router, computed for the first.
        """
        if torch.compiler.is_compiling():
            # a dictionary keyed by sizes would make a graph for each
            return (*self.sequence_T(batch, length, device), self.mask_T(batch, length))
        found = self.tokens.get((batch, length, device))
        if found is None:
            found = self.tokens[batch, length, device] = (
                *self.sequence_T(batch, length, device),
                self.mask_T(batch, length),
            )
        return found

    def rows(self, value: Tensor, batch: int, name: str) -> Tensor:
        """Repeat a per-row value to `batch` rows: beams and returned sequences repeat each row.

        Raises:
            RoutingError: if `batch` is not a multiple of the value's rows, or the rows of the batch are not known.
        """
        if not self.rows_known:
            return self._same_for_all(value, batch, name)
        if value.shape[0] == batch:
            return value
        if value.shape[0] == 0 or batch % value.shape[0]:
            raise RoutingError(
                f"{name} has {value.shape[0]} rows but the forward pass has {batch}: "
                f"give one row for each batch row (a multiple of them is repeated for beams)."
            )
        return value.repeat_interleave(batch // value.shape[0], dim=0)

    def _same_for_all(self, value: Tensor, batch: int, name: str) -> Tensor:
        """One value for all rows of a tower, whose images may belong to any row of the batch."""
        first = value[:1]
        if bool((value == first).all()):
            return first.expand(batch, *value.shape[1:])
        raise RoutingError(
            f"{name} differs between the rows of the batch, and an adapted tower (vision, audio, a projector) sees images "
            "or clips that may belong to any of them: give all rows the same value, or leave the tower out with "
            "exclude_modules."
        )


def _of_lengths(lengths: tuple[int, ...], total: int) -> tuple[Tensor | None, int | None]:
    """Which image each token belongs to, int64 [1, total], and the number of images; None where the sizes do not fit."""
    step, rest = divmod(sum(lengths), total)
    if rest or any(length % step for length in lengths):
        return None, None
    counts = torch.tensor(lengths) // step
    return torch.arange(len(lengths)).repeat_interleave(counts)[None], len(lengths)


def _crop(value_BS: Tensor | None, batch: int, length: int, name: str) -> Tensor | None:
    """Flatten [B, S] to tokens, keeping the last `length` columns."""
    if value_BS is None:
        return None
    rows, columns = value_BS.shape
    if rows * columns == batch * length:
        return value_BS.reshape(-1)
    if rows == batch and columns > length:
        return value_BS[:, columns - length :].reshape(-1)
    raise RoutingError(
        f"the {name} has shape [{rows}, {columns}] but a routed layer sees [{batch}, {length}] tokens: "
        "pass an attention mask of the input's own length, or route this layer with router_sharing='none'."
    )
