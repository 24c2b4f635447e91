"""Scopes: which decisions there are, and what each one is made from.

A scope turns the tokens of a forward pass into decisions. Token scope decides for each token; sequence scope pools
the real prompt tokens of a sequence; task scope has no input but the row's task id. Pooling happens on the inputs,
on the logits or on the probabilities.

Shapes: B rows, S sequence, T = B*S tokens, N decisions, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from moe_kit.errors import ConfigError, RoutingError
from moe_kit.routing.context import RoutingContext

JOINED = "tokens of several sequences lie in one row and nothing tells which token belongs to which"
"""How a refusal of joined sequences begins."""

Pool = Literal["inputs", "logits", "probabilities"]


@dataclass(frozen=True)
class Decisions:
    """The decision points of one forward pass.

    Attributes:
        x_ND: float [N, D], what is scored; [T, D] when logits are pooled after scoring; None for a task table.
        decision_T: int64 [T], decision of each token; None = one a token.
        sequence_N: int64 [N], sequence of each decision.
        num_sequences: number of sequences.
        mask_N: bool [N], False where a decision concerns only padding; None = all real.
        pool_T: bool [T], tokens that count in pooling after scoring; None = no pooling after scoring.
        task_ids_N: int64 [N], for task tables.
        row_N: int64 [N], batch row of each decision; None = decisions are rows.
    """

    x_ND: Tensor | None
    decision_T: Tensor | None = None
    sequence_N: Tensor | None = None
    num_sequences: int | None = None
    mask_N: Tensor | None = None
    pool_T: Tensor | None = None
    task_ids_N: Tensor | None = None
    row_N: Tensor | None = None


class Scope(Protocol):
    """Names the decisions of a forward pass.

    Attributes:
        name: name in a configuration.
        outlives_forward: decisions are made on the prompt and obeyed while decoding.
    """

    name: str
    outlives_forward: bool

    def decisions(self, x_BSD: Tensor, context: RoutingContext) -> Decisions:
        """Decision points for an input [B, S, D]."""
        ...


@dataclass(frozen=True)
class TokenScope:
    """One decision for each token."""

    name = "token"
    outlives_forward = False

    def decisions(self, x_BSD: Tensor, context: RoutingContext) -> Decisions:
        """Every token decides for itself; padding decides too, and is masked out of losses and loads.

        Args:
            x_BSD: float [B, S, D].
            context: the pass.
        """
        batch, length, width = x_BSD.shape
        sequence_T, count, mask_T = context.tokens_of(batch, length, x_BSD.device)
        return Decisions(x_ND=x_BSD.reshape(-1, width), sequence_N=sequence_T, num_sequences=count, mask_N=mask_T)


@dataclass(frozen=True)
class SequenceScope:
    """One decision for each sequence, from its real prompt tokens.

    Attributes:
        pool: what is averaged over the prompt: "inputs", "logits" or "probabilities"; others raise ConfigError.
    """

    pool: Pool = "inputs"
    name = "sequence"
    outlives_forward = True

    def __post_init__(self) -> None:
        _check_pool(self.pool)

    def decisions(self, x_BSD: Tensor, context: RoutingContext) -> Decisions:
        """Pools with the prompt mask, so padding and answers never take part.

        Args:
            x_BSD: float [B, S, D].
            context: the pass.

        Raises:
            RoutingError: if tokens of several sequences lie in one row and nothing tells them apart.
        """
        return _pooled(self, x_BSD, context)


@dataclass(frozen=True)
class RequestScope:
    """One decision for each batch row, whatever documents are packed in it, from its real prompt tokens.

    Attributes:
        pool: what is averaged over the prompt: "inputs", "logits" or "probabilities"; others raise ConfigError.
    """

    pool: Pool = "inputs"
    name = "request"
    outlives_forward = True

    def __post_init__(self) -> None:
        _check_pool(self.pool)

    def decisions(self, x_BSD: Tensor, context: RoutingContext) -> Decisions:
        """As `SequenceScope`, with rows in place of sequences.

        Args:
            x_BSD: float [B, S, D].
            context: the pass.
        """
        if context.rows_known:
            context = replace(context, sequence_BS=None, num_sequences=None)
        # in a tower, whose rows are not the batch's, an image is what a request can tell
        return _pooled(self, x_BSD, context)


@dataclass(frozen=True)
class TaskScope:
    """One decision for each batch row, from its task id alone.

    Attributes:
        num_tasks: rows of the task table; ids outside [0, num_tasks) raise.
    """

    num_tasks: int
    name = "task"
    outlives_forward = False

    def decisions(self, x_BSD: Tensor, context: RoutingContext) -> Decisions:
        """Reads `context.task_ids_B`.

        Args:
            x_BSD: float [B, S, D], only its shape matters.
            context: the pass.

        Raises:
            RoutingError: if no task ids were given, or one is out of range.
        """
        batch, length, _ = x_BSD.shape
        if context.task_ids_B is None:
            raise RoutingError(
                "this adapter routes by task but the forward pass got no task ids: wrap the call in "
                "`with routing_inputs(model, task_ids=...)`."
            )
        task_ids_B = context.rows(context.task_ids_B, batch, "task_ids").to(x_BSD.device)
        low, high = int(task_ids_B.min()), int(task_ids_B.max())
        if low < 0 or high >= self.num_tasks:
            raise RoutingError(
                f"task ids lie in [{low}, {high}], expected [0, {self.num_tasks - 1}]: fix the ids or raise num_tasks."
            )
        rows_B = torch.arange(batch, device=x_BSD.device)
        decision_T = rows_B.repeat_interleave(length, output_size=batch * length)
        return Decisions(None, decision_T, rows_B, batch, None, task_ids_N=task_ids_B)


def _pooled(scope: SequenceScope | RequestScope, x_BSD: Tensor, context: RoutingContext) -> Decisions:
    batch, length, width = x_BSD.shape
    check_sequences(context, f"scope={scope.name!r}")
    sequence_T, count = context.sequence_T(batch, length, x_BSD.device)
    prompt_T = context.prompt_mask_T(batch, length)
    x_TD = x_BSD.reshape(-1, width)
    mask_T = context.mask_T(batch, length)
    mask_N = None if mask_T is None else pool_sum(mask_T[:, None].float(), sequence_T, count)[:, 0] > 0
    if prompt_T is None:
        prompt_T = torch.ones(batch * length, dtype=torch.bool, device=x_BSD.device)
    sequence_N = torch.arange(count, device=x_BSD.device)
    if scope.pool == "inputs":
        x_ND = pool_mean(x_TD.float(), sequence_T, count, prompt_T)
        return Decisions(x_ND, sequence_T, sequence_N, count, mask_N)
    return Decisions(x_TD, sequence_T, sequence_N, count, mask_N, pool_T=prompt_T)


def check_sequences(context: RoutingContext, what: str) -> None:
    """Refuse a decision about a sequence where its tokens cannot be told from others.

    Args:
        context: the pass.
        what: what would decide, for the message.

    Raises:
        RoutingError: if tokens of several sequences lie in one row and nothing tells them apart.
    """
    if not context.sequences_known:
        raise RoutingError(
            f"{JOINED}, so {what} cannot decide for each. Under continuous batching call `generate` in place of "
            "`generate_batch`; in a tower leave such layers out with exclude_modules; or decide for each token."
        )


def _check_pool(pool: str) -> None:
    if pool not in get_args(Pool):
        raise ConfigError(f"pool is {pool!r}, expected one of {', '.join(get_args(Pool))}.")


def pool_sum(value_TD: Tensor, sequence_T: Tensor, count: int) -> Tensor:
    """Sum of token values for each sequence.

    Args:
        value_TD: float [T, D].
        sequence_T: int64 [T].
        count: number of sequences.

    Returns:
        float [count, D].
    """
    return value_TD.new_zeros(count, value_TD.shape[1]).index_add(0, sequence_T, value_TD)


def pool_mean(value_TD: Tensor, sequence_T: Tensor, count: int, mask_T: Tensor) -> Tensor:
    """Mean over the masked tokens of each sequence; zero for a sequence without any.

    Args:
        value_TD: float [T, D].
        sequence_T: int64 [T].
        count: number of sequences.
        mask_T: bool [T], tokens that count.

    Returns:
        float [count, D].
    """
    weight_T1 = mask_T[:, None].to(value_TD.dtype)
    # NOTE: where, not a product: a padding row may hold NaN or inf
    total = pool_sum(torch.where(mask_T[:, None], value_TD, 0.0), sequence_T, count)
    return total / pool_sum(weight_T1, sequence_T, count).clamp_min(1.0)
