"""`Route`: what one request does at every unit, kept where obeying it costs nothing.

The carried form is one int64 table [B, U] on the CPU (0 skip, 1 execute, 2 repeat, 3 approximate, -1 not decided yet),
which beams reorder and caches carry. A `Route` is a view of it with the plans that were made from it: it lives in the
carrier's notes, which are dropped whenever rows change, and is then read from the table again.

Shapes: B rows, U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_kit.depth.config import APPROXIMATE, EXECUTE, REPEAT, SKIP, LayerRoutingConfig
from moe_kit.depth.execute import Plan
from moe_kit.errors import RoutingError

if TYPE_CHECKING:
    from moe_kit.depth.unit import DepthUnit

UNDECIDED = -1


class Route:
    """The decisions of one request.

    Args:
        table_BU: int64 [B, U] on the CPU; written in place.

    Attributes:
        plans: column -> plan, made when its unit is first reached.
        agreed: what the user forced or replayed when the plans were made or last compared.
        drawn: column -> actions of the random baseline.
        executing: units that execute for every row, once all are known.
        skipping: decoder layers that every row skips, once all are known.
    """

    def __init__(self, table_BU: Tensor) -> None:
        self.table_BU = table_BU
        # the same memory: an element costs a microsecond, an indexed tensor ten
        self._cells = table_BU.numpy()
        self.plans: dict[int, Plan] = {}
        self.agreed: Any = None
        self.drawn: list[list[int]] | None = None
        self.executing: frozenset[DepthUnit] | None = None
        self.skipping: frozenset[DepthUnit] = frozenset()

    @classmethod
    def undecided(cls, batch: int, columns: int) -> Route:
        """A route without any decision."""
        return cls(torch.full((batch, columns), UNDECIDED))

    @property
    def batch(self) -> int:
        """B."""
        return self.table_BU.shape[0]

    def without_units(self) -> Route:
        """The same decisions and plans, without a reference to the units that make them."""
        copied = Route(self.table_BU)
        copied.plans, copied.agreed, copied.drawn = self.plans, self.agreed, self.drawn
        return copied

    def known(self, column: int) -> list[int] | None:
        """Action of each row at a unit, or None if a row is undecided."""
        actions = self._cells[:, column].tolist()
        return None if UNDECIDED in actions else actions

    def decide(self, column: int, actions: list[int]) -> None:
        """Write the actions of a unit."""
        self._cells[:, column] = actions

    def settle(self, units: Mapping[int, DepthUnit]) -> None:
        """Note which units execute for every row and which layers every row skips, if the plans of all are made."""
        if self.executing is None and len(self.plans) == len(units):
            plans = [(units[column], plan.uniform) for column, plan in self.plans.items()]
            self.executing = frozenset(unit for unit, action in plans if action == EXECUTE)
            self.skipping = frozenset(unit for unit, action in plans if action == SKIP and unit.kind == "layer")

    def check_rows(self, batch: int) -> None:
        """Refuse another batch.

        Raises:
            RoutingError: if the request has other rows.
        """
        if self.batch != batch:
            raise RoutingError(
                f"the cache carries routes of {self.batch} rows but the forward pass has {batch}: use one cache "
                "for one batch, or expand it with cache.batch_repeat_interleave."
            )

    def obeys(self, forced_RU: Tensor) -> bool:
        """Whether a forced table (its rows repeated for beams) asks for nothing but what was decided."""
        rows = forced_RU.shape[0]
        if self.batch % rows:
            return False
        table_BRU = self.table_BU.view(rows, -1, self.table_BU.shape[1])
        return bool(((table_BRU == forced_RU[:, None]) | (table_BRU == UNDECIDED)).all())

    def agree(self, asked: Iterable[tuple[str, int, list[int] | None]]) -> None:
        """Refuse other actions than those that the request was begun with.

        Args:
            asked: path and column of each unit, and the actions that are forced or replayed there now, if any.

        Raises:
            RoutingError: if a decided unit is asked for something else.
        """
        for path, column, actions in asked:
            known = None if actions is None else self.known(column)
            if known is not None and known != actions:
                raise RoutingError(
                    f"{path}: this request was decided as {known} but {actions} is forced now: "
                    "a cache continues with the routes it was filled with; use a fresh cache for other routes."
                )


def refuse_others(sites: Mapping[str, Tensor], prefix: str, own: str | None) -> None:
    """Refuse a cache that other layer routers filled: keys of what they skipped are missing, others too many.

    Args:
        sites: decisions that ride on the cache.
        prefix: of the sites that hold layer routes.
        own: site of the active adapter, or None.

    Raises:
        RoutingError: if another adapter did anything but execute.
    """
    for site, table_BU in sites.items():
        if site.startswith(prefix) and site != own and bool(((table_BU != EXECUTE) & (table_BU != UNDECIDED)).any()):
            present = "no layer router is active" if own is None else f"{own.removeprefix(prefix)!r} is active"
            raise RoutingError(
                f"the cache was filled under routes of the layer router {site.removeprefix(prefix)!r}, now {present}: a "
                "cache continues with the routes it was filled with; activate that router again, or use a fresh cache."
            )


def repeat_rows(value: list[int], batch: int) -> list[int]:
    """Rows of a per-row value for a batch; a batch that is a multiple repeats each row (beams).

    Args:
        value: one entry a row.
        batch: rows of the forward pass.

    Returns:
        `batch` entries.

    Raises:
        RoutingError: if the batch is no multiple of the rows.

    Example:
        >>> repeat_rows([0, 2], 4)
        [0, 0, 2, 2]
    """
    rows = len(value)
    if rows == batch:
        return value
    if rows == 0 or batch % rows:
        raise RoutingError(
            f"actions for {rows} rows were given but the forward pass has {batch}: give one row for all, or one for "
            "each batch row (a batch that is a multiple repeats each row, for beams)."
        )
    return [entry for entry in value for _ in range(batch // rows)]


def check_record(
    record: Mapping[str, Tensor], adapter: str, units: Mapping[int, DepthUnit], config: LayerRoutingConfig
) -> None:
    """Refuse a record of another model before it is obeyed in part.

    Args:
        record: site -> ids, of any kind of router.
        adapter: the active layer routers.
        units: their units.
        config: their configuration.

    Raises:
        RoutingError: if it holds layer routes but not those of exactly these units, or values that are no action here.
    """
    routes = {site for site in record if ".depth." in site}
    wanted = {unit.site(adapter) for unit in units.values() if not unit.leaders[adapter]}
    if not routes:
        return
    if routes != wanted:
        strange, missing = sorted(routes - wanted), sorted(wanted - routes)
        raise RoutingError(
            f"the replayed record is of another model or adapter: it has {len(routes)} layer routes, this model "
            f"{len(wanted)} units; not here: {strange[:3]}, not recorded: {missing[:3]}. Record with the same layer routers."
        )
    known = [SKIP, EXECUTE, APPROXIMATE]
    if config.units == "layer" and config.scope == "sequence":
        known.append(REPEAT)
    for site in routes:
        found = set(record[site].unique().tolist())
        if found - set(known):
            raise RoutingError(
                f"the replayed record holds actions {sorted(found)} at {site}, which can only do {sorted(known)} "
                "(0 skip, 1 execute, 2 repeat, 3 approximate)."
            )
