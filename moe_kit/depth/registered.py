"""What layer routers show to the routing context: their decisions, and their losses with the coefficients.

A context closes over the decisions that were registered in a pass: recording, metrics and auxiliary losses read them.
The losses of layer routers are computed over all units at once, so one of the decisions brings their finished values;
from there they go where those of routed adapters go (`moe_kit.hf.delivery`).

Shapes: N decisions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from moe_kit.routing.context import RoutingContext


class Quiet:
    """Stands for a router that has no balance losses.

    Args:
        unit: the module that has the router.
    """

    losses: dict[str, Any] = {}
    # actions are no experts: metrics of load and collapse leave them out
    has_experts = False

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit

    @property
    def training(self) -> bool:
        """True in training mode."""
        return self.unit.training

    @property
    def is_frozen(self) -> bool:
        """True if nothing of the unit is trained."""
        return not any(parameter.requires_grad for parameter in self.unit.parameters())


class Priced(Quiet):
    """Stands for all layer routers of a model and brings their losses.

    Args:
        unit: one of their modules.
        losses: name -> (coefficient, unscaled loss).
    """

    group = "moe_depth"

    def __init__(self, unit: nn.Module, losses: dict[str, tuple[float, Tensor]]) -> None:
        super().__init__(unit)
        self._coefficients = {name: coefficient for name, (coefficient, _) in losses.items()}
        # the form of a loss over stacked decisions: one value a site
        self.losses = {name: (c, lambda stack, loss=loss: loss.reshape(1)) for name, (c, loss) in losses.items()}

    def coefficient(self, name: str) -> float:
        """Coefficient of a loss."""
        return self._coefficients[name]

    def parameters(self) -> list[nn.Parameter]:
        """None: the routers belong to their units."""
        return []


def hand_over(context: RoutingContext, losses: dict[str, tuple[float, Tensor]]) -> None:
    """Let the last decision of a layer router that was registered bring the losses of all.

    Args:
        context: the pass, still open.
        losses: name -> (coefficient, unscaled loss).
    """
    if not losses or not context.is_open:
        return
    for index in reversed(range(len(context.registered))):
        site, routing, router = context.registered[index]
        if type(router) is Quiet:
            # a decision without logits is taken for a forced one, which has no losses
            logits_NE = routing.weights_NK.new_zeros(routing.weights_NK.shape[0], routing.num_experts)
            context.registered[index] = (
                site,
                dataclasses.replace(routing, logits_NE=logits_NE),
                Priced(router.unit, losses),
            )
            return
