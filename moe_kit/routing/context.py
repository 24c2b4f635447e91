"""What a routing decision may know besides its input `x`.

A `RoutingContext` belongs to one forward pass of a model. It is made when the pass starts and lives until the next
one starts, because recomputation under gradient checkpointing reads it again while the backward pass runs.

Shapes: B batch rows, S sequence, T = B*S tokens, E experts, N decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_kit.errors import RoutingError

if TYPE_CHECKING:
    from moe_kit.routing.decision import Routing
    from moe_kit.routing.step import PassCounts


@dataclass(slots=True)
class SharedInput:
    """What layers that read one input have in common in a pass.

    Attributes:
        reference: gives the input, or None once it is gone.
        routing: the decision about it.
        mode: (whether the pass was open, whether there was a graph) when it was made.
        outputs: outputs computed along with the first layer's, by module path; each is taken once.
    """

    reference: Callable[[], Tensor | None]
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
        return self.mode == mode and self.reference() is x


@dataclass
class RoutingContext:
    """Facts about one forward pass, shared by all routers of a model.

    Attributes:
        mask_BS: bool [B, S], True for real tokens; None = all real.
        prompt_mask_BS: bool [B, S], True for tokens a sequence-scope decision may read; None = `mask_BS`.
        shape_BS: (B, S) of the pass's tokens; None = not known. It tells the rows of a flattened input.
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
    """

    mask_BS: Tensor | None = None
    prompt_mask_BS: Tensor | None = None
    shape_BS: tuple[int, int] | None = None
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
    registered: list[tuple[str, Routing, torch.nn.Module]] = field(default_factory=list)
    carried: dict[str, Tensor] | None = None
    policy_gradient: bool = False
    learns: bool | None = None
    counts: PassCounts | None = None
    is_open: bool = True
    closed_losses: dict[str, Tensor] = field(default_factory=dict)
    closed_terms: list[tuple[Any, str, Tensor]] = field(default_factory=list)
    # not taken over by `dataclasses.replace`: another view of a pass has other tokens
    tokens: dict[tuple[int, int, torch.device], tuple[Tensor, int, Tensor | None]] = field(
        default_factory=dict, init=False
    )

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
        return cropped, self.num_sequences

    def tokens_of(self, batch: int, length: int, device: torch.device) -> tuple[Tensor, int, Tensor | None]:
        """Sequence of each token, number of sequences, and mask of each token.

        Args:
            batch: rows of the input.
            length: columns of the input.
            device: where the index lives.

        Returns:
            As `sequence_T` and `mask_T`; asked by every router, computed for the first.
        """
        found = self.tokens.get((batch, length, device))
        if found is None:
            found = (*self.sequence_T(batch, length, device), self.mask_T(batch, length))
            if not torch.compiler.is_compiling():
                self.tokens[batch, length, device] = found
        return found

    def rows(self, value: Tensor, batch: int, name: str) -> Tensor:
        """Repeat a per-row value to `batch` rows: beams and returned sequences repeat each row.

        Raises:
            RoutingError: if `batch` is not a multiple of the value's rows.
        """
        if value.shape[0] == batch:
            return value
        if value.shape[0] == 0 or batch % value.shape[0]:
            raise RoutingError(
                f"{name} has {value.shape[0]} rows but the forward pass has {batch}: "
                f"give one row for each batch row (a multiple of them is repeated for beams)."
            )
        return value.repeat_interleave(batch // value.shape[0], dim=0)


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
