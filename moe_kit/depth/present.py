"""What belongs to one forward pass of a model with layer routers; recomputation of a pass finds that of its own.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_kit.depth.losses import Trace
from moe_kit.depth.route import Route
from moe_kit.hf.cache import CarriedDecisions
from moe_kit.routing.decision import leaf_of

if TYPE_CHECKING:
    from moe_kit.depth.tokens import TokenDecision
    from moe_kit.depth.unit import DepthUnit


@dataclass(eq=False)
class DepthPass:
    """One forward pass.

    Attributes:
        carrier: decisions of the request.
        row_keys_B: int64 [B], a number for each row that depends on its prompt, for the random baseline.
        executing: units that are known to execute for every row, and need not be asked.
        skipping: units of decoder layers that are known to be skipped by every row.
        traces: what units decided, in training.
        decisions: column -> what the tokens do there (token scope).
        foreign: True if the cache was filled without routes of the active adapter.
        router_logits: the caller asked a mixture-of-experts base for its routers' logits.
        blind: a unit whose trainable router decided without a graph in training, else None.
        decided_now: whether a unit decided in this pass.
        scores: the pass reads whole sequences, without a cache, and is no part of `generate`.
        under_way: the module whose forward is under way; None once it has ended.
        cache: the cache that the carrier lies on, while the pass is under way.
        pooling: (windows, rows, columns, device) -> tokens that a decision may read, and their windows.
        used: (adapter, route, device) of the decision that was asked for, while the pass is under way.
    """

    carrier: CarriedDecisions = field(default_factory=CarriedDecisions)
    row_keys_B: Tensor | None = None
    executing: frozenset[DepthUnit] = frozenset()
    skipping: frozenset[DepthUnit] = frozenset()
    traces: list[Trace] = field(default_factory=list)
    decisions: dict[int, TokenDecision] = field(default_factory=dict)
    foreign: bool = False
    router_logits: bool = False
    blind: DepthUnit | None = None
    decided_now: bool = False
    scores: bool = False
    under_way: nn.Module | None = None
    cache: Any = None
    pooling: dict[tuple, Any] = field(default_factory=dict)
    used: tuple[str, Route, torch.device] | None = None

    def for_recomputation(self) -> DepthPass:
        """What recomputation reads of this pass, without a graph."""
        decisions = {
            column: replace(decision, trace=None, gate_T=leaf_of(decision.gate_T))
            for column, decision in self.decisions.items()
        }
        carrier = CarriedDecisions()
        carrier.sites = dict(self.carrier.sites)
        for name, note in self.carrier.notes.items():
            carrier.notes[name] = note.without_units() if isinstance(note, Route) else note
        return DepthPass(carrier, self.row_keys_B, decisions=decisions, pooling=dict(self.pooling), scores=self.scores)
