"""What a batch must be for a routing decision to make sense, told before any layer runs.

A row without a real token has nothing to decide about: pooled decisions would be made from zeros, and labels on such a
row would be learnt from nothing. Transformers lets it pass in silence. The one place where such rows are in order is
the first chunk of a left-padded prompt that is read in pieces, which only routers for single tokens may meet.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kit.errors import RoutingError

_NAMED = 8


def check_rows(attention_mask: Any) -> None:
    """Refuse a two-dimensional mask with rows of padding alone.

    On the CPU only and not while compiling: a device would have to be waited for.

    Args:
        attention_mask: [B, S'], the tokens in a cache included; any other form is left alone.

    Raises:
        RoutingError: naming the rows.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.device.type != "cpu":
        return
    if torch.compiler.is_compiling() or attention_mask.numel() == 0 or bool(attention_mask.any(1).all()):
        return
    rows = (~attention_mask.bool().any(1)).nonzero()[:, 0].tolist()
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    raise RoutingError(
        f"rows {rows[:_NAMED]}{more} of the attention mask {list(attention_mask.shape)} hold no real token, expected at "
        "least one in each row: there is nothing to route. Leave these rows out of the batch, or look at how it is padded."
    )


def fitting_prompt(given_BS: Tensor, shape: torch.Size, arguments: dict[str, Any]) -> Tensor | None:
    """A prompt mask from outside, for the tokens of this pass.

    Args:
        given_BS: bool or 0/1, [B, S].
        shape: [B, S] of the tokens; a multiple of the mask's rows repeats each row (beams).
        arguments: arguments of the model by name; they tell whether tokens before these are in a cache.

    Returns:
        bool [B, S]; None while decoding, when decisions made on the prompt are obeyed.

    Raises:
        RoutingError: if the mask does not fit the first pass of a request.
    """
    rows, columns = int(shape[0]), int(shape[1])
    given = given_BS.shape[0] if given_BS.dim() == 2 and given_BS.shape[1] == columns else 0
    if given and rows % given == 0:
        return given_BS.bool().repeat_interleave(rows // given, dim=0)
    if _goes_on(columns, arguments):
        return None
    raise RoutingError(
        f"prompt_mask has shape {list(given_BS.shape)}, expected [{rows}, {columns}]: one value for each token of the batch, "
        "padding included (1 = a token that the decision may read)."
    )


def _goes_on(columns: int, arguments: dict[str, Any]) -> bool:
    """Whether the tokens follow others that are in a cache."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.shape[1] > columns
    cache = arguments.get("past_key_values")
    return cache is not None and int(cache.get_seq_length()) > 0
