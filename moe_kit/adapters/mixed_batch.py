"""Batches whose rows use different adapters: PEFT's `adapter_names`, one name a row, `"__base__"` for none.

Each row's result is what it would be in a batch under its own adapter alone. An adapter's routers decide about the whole
batch with every other row as padding, so that decisions carried on a cache keep their rows (beams reorder them); its bank
is given the tokens of its own rows only.

Shapes: B rows, S sequence, T = B*S tokens, U tokens of one adapter's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from moe_kit.errors import RoutingError
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.state import find_routing_state

BASE = "__base__"
_GENERATION = ("num_beams", "num_return_sequences")


@dataclass(frozen=True)
class RowAdapters:
    """The adapter of each row of a batch.

    Attributes:
        names: adapter of each row, or `"__base__"`.
        copies: how often `generate` repeats each row, for beams or returned sequences.
    """

    names: tuple[str, ...]
    copies: int = 1

    def of_rows(self, rows: int) -> tuple[str, ...]:
        """Names for a batch with that many rows.

        Args:
            rows: those of a layer's input; an encoder does not see the copies that beams make.

        Raises:
            RoutingError: if the names are not one a row.
        """
        for copies in (1, self.copies):
            if rows == len(self.names) * copies:
                return tuple(name for name in self.names for _ in range(copies))
        beams = f" (or {len(self.names) * self.copies}, as generate repeats them)" if self.copies > 1 else ""
        raise RoutingError(
            f"adapter_names has {len(self.names)} names but the batch has {rows} rows, expected {len(self.names)}{beams}: "
            "give one name for each row of the batch."
        )

    def rows_of(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of flattened tokens, every row of which is there.

        Args:
            tokens: T.

        Returns:
            (B, S), with the fewest rows that they can be.

        Raises:
            RoutingError: if they are no whole rows.
        """
        if tokens % len(self.names):
            raise RoutingError(
                f"adapter_names has {len(self.names)} names but experts see {tokens} tokens, which are not as many in each "
                "row: give one name for each row of the batch."
            )
        return len(self.names), tokens // len(self.names)

    def groups(self, batch: int, length: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Rows and tokens of each adapter.

        Args:
            batch: B.
            length: S.
            device: where the tokens are.

        Returns:
            Adapter -> (bool [B] its rows, int64 [U] its tokens). Their sizes depend on the names only.
        """
        names = self.of_rows(batch)
        tokens_BS = torch.arange(batch * length, device=device).view(batch, length)
        found = {}
        for adapter in dict.fromkeys(names):
            if adapter != BASE:
                own_B = torch.tensor([name == adapter for name in names], device=device)
                rows = torch.tensor([row for row, name in enumerate(names) if name == adapter], device=device)
                found[adapter] = (own_B, tokens_BS[rows].flatten())
        return found


def context_of_rows(context: RoutingContext, own_B: Tensor, length: int) -> RoutingContext:
    """The same pass with every other row as padding.

    Args:
        context: context of the layer's tokens.
        own_B: bool [B], rows that count.
        length: S of the layer's input.

    Raises:
        RoutingError: if the rows of the pass are not the layer's.
    """
    batch = own_B.shape[0]
    if not context.rows_known and not bool(own_B.all()):
        raise RoutingError(
            "adapter_names: an adapted tower (vision, audio, a projector) sees images or clips that may belong to any row: "
            "leave the tower out with exclude_modules, or use one adapter a batch."
        )
    masks: dict[str, Any] = {}
    for name in ("mask_BS", "prompt_mask_BS"):
        mask_BS = getattr(context, name)
        if mask_BS is not None:
            if mask_BS.shape[0] != batch:
                raise RoutingError(
                    f"adapter_names: a layer sees {batch} rows but its mask has {mask_BS.shape[0]}: such a layer cannot tell "
                    "rows apart. Leave it out of target_modules, or use one adapter a batch."
                )
            masks[name] = mask_BS & own_B[:, None].to(mask_BS.device)
    if "mask_BS" not in masks:
        masks["mask_BS"] = own_B[:, None].expand(batch, length)
    if context.task_ids_B is not None:
        # tasks of other rows are another adapter's, and may not exist here
        task_ids_B = context.rows(context.task_ids_B, batch, "task_ids").to(own_B.device)
        masks["task_ids_B"] = torch.where(own_B, task_ids_B, 0)
    return context.derive(**masks)


@contextmanager
def rows_with_adapters(model: nn.Module, kind: tuple[type, ...], given: Any, call: dict[str, Any]) -> Iterator[None]:
    """Hand each row's adapter to the layers while the block runs.

    Args:
        model: the wrapped inner model, in evaluation mode.
        kind: tuner layers that take `adapter_names`, a `RowAdapters`.
        given: the user's `adapter_names`.
        call: arguments of `forward` or `generate` by name.

    Raises:
        RoutingError: if the model trains, or a name is unknown.
    """
    rows = _checked(model, kind, given, call)
    # the pass is open by then; experts of the base alone could not tell that rows are missing
    handles = [model.register_forward_pre_hook(lambda module, args: _check_rows(rows, module))]
    active = []
    try:
        for module in model.modules():
            if isinstance(module, kind):
                handles.append(module.register_forward_pre_hook(_giving(rows), with_kwargs=True))
            elif isinstance(module, AuxiliaryTrainingWrapper):
                handles.append(
                    module.register_forward_pre_hook(_giving_names(rows, module._adapters), with_kwargs=True)
                )
                # PEFT asks about rows only where the active adapter has a copy
                active.append((module, module._active_adapter))
                module._active_adapter = sorted(module._adapters)[:1]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, name in active:
            module._active_adapter = name


def _check_rows(rows: RowAdapters, model: nn.Module) -> None:
    state = find_routing_state(model)
    shape = None if state is None else state.context.shape_BS
    if shape is not None:
        rows.of_rows(shape[0])


def _checked(model: nn.Module, kind: tuple[type, ...], given: Any, call: dict[str, Any]) -> RowAdapters:
    if model.training:
        raise RoutingError("adapter_names (an adapter for each row) is for inference: call model.eval() first.")
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise RoutingError(f"adapter_names is {given!r}, expected a list with the name of an adapter for each row.")
    known = {name for module in model.modules() if isinstance(module, kind) for name in module.moe_adapter_bank}
    unknown = sorted(set(given) - known - {BASE})
    if unknown:
        raise RoutingError(
            f"adapter_names has {', '.join(map(repr, unknown))}, expected names among {', '.join(sorted(known))}, or "
            f"{BASE!r} for the base model."
        )
    settings = (call, call.get("generation_config"), getattr(model, "generation_config", None))
    copies = [next((n for place in settings if (n := _setting(place, name)) is not None), 1) for name in _GENERATION]
    return RowAdapters(tuple(given), max(copies))


def _setting(place: Any, name: str) -> int | None:
    found = place.get(name) if isinstance(place, dict) else getattr(place, name, None)
    return found if isinstance(found, int) else None


def _giving(rows: RowAdapters) -> Any:
    return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": rows})


def _giving_names(rows: RowAdapters, adapters: set[str]) -> Any:
    # an adapter without a copy of this module uses the base's
    def give(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        names = [name if name in adapters else BASE for name in rows.of_rows(len(args[0]))]
        return args, {**kwargs, "adapter_names": names}

    return give
