"""The context of a pass, cut to the rows or tokens that run: routers of adapters inside a routed unit see only those.

Shapes: B rows, S sequence, N running rows or kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from moe_kit.hf.hooks import HookedRouting

# fields whose first dimension is the batch
_ROWS = ("mask_BS", "prompt_mask_BS", "task_ids_B", "prior_BE", "forced_ids_BK", "forced_weights_BE")


@contextmanager
def running_rows(routing: HookedRouting, rows_N: Tensor, batch: int) -> Iterator[None]:
    """Let routers inside see only some rows; what they decide for a request is kept for all rows, zeros elsewhere.

    Args:
        routing: routing state of the model.
        rows_N: int64 [N], the rows that run.
        batch: B.
    """
    whole = routing.context
    changes: dict[str, Any] = {name: _cut(getattr(whole, name), rows_N, batch) for name in _ROWS}
    changes["scalars"] = {name: _cut(value, rows_N, batch) for name, value in whole.scalars.items()}
    # packed rows cannot be cut by rows, and a packed batch has no per-sequence layer routes
    changes["sequence_BS"], changes["num_sequences"] = None, None
    if whole.shape_BS is not None:
        changes["shape_BS"] = (rows_N.shape[0], whole.shape_BS[1])
    if whole.carried is not None:
        changes["carried"] = {site: _cut(value, rows_N, batch) for site, value in whole.carried.items()}
    narrow = whole.derive(**changes)
    try:
        with routing.showing(narrow):
            yield
    finally:
        if whole.carried is not None and narrow.carried is not None:
            for site in narrow.carried.keys() - whole.carried.keys():
                value = narrow.carried[site]
                full = value.new_zeros((batch, *value.shape[1:]))
                whole.carried[site] = full.index_copy(0, rows_N.to(value.device), value)


@contextmanager
def running_tokens(routing: HookedRouting, index_BN: Tensor, batch: int, length: int, flat: bool) -> Iterator[None]:
    """Let routers inside see only the kept tokens.

    Args:
        routing: routing state of the model.
        index_BN: int64 [B, N], kept columns of each row; or, flat, [1, N] positions in the flattened tokens, -1 unused.
        batch: B.
        length: S.
        flat: whether the module gets one row of N tokens.
    """
    whole = routing.context
    mask_BS = whole.mask_BS
    changes: dict[str, Any] = {"prompt_mask_BS": None}
    if flat:
        position = index_BN.clamp_min(0)
        used = index_BN >= 0
        changes["mask_BS"] = used if mask_BS is None else used & mask_BS.reshape(-1)[position]
        changes["sequence_BS"], changes["num_sequences"] = position // length, batch
    elif mask_BS is not None:
        changes["mask_BS"] = mask_BS.gather(1, index_BN)
    changes["shape_BS"] = tuple(index_BN.shape)
    with routing.showing(whole.derive(**changes)):
        yield


def _cut(value: Any, rows_N: Tensor, batch: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
        return value.index_select(0, rows_N.to(value.device))
    if isinstance(value, Tensor) and value.dim() and value.shape[0] > 1 and batch % value.shape[0] == 0:
        # given per prompt, repeated for beams
        return value.repeat_interleave(batch // value.shape[0], 0).index_select(0, rows_N.to(value.device))
    return value
