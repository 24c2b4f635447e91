"""Routing metrics in a trainer's log, and one warning when layers collapse.

`RoutedTrainer` does this by itself; `RoutingMetricsCallback` does it under the stock Trainer and TRL. The figures are
those of `moe_kit.routing_metrics` with the prefix `routing_`: at most twelve, whatever the number of layers, read from
the last forward pass before a line with the training loss is logged (the step's last micro-batch, of the main process).
Steps that log nothing cost nothing.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback

from moe_kit.routing.metrics import routing_metrics
from moe_kit.routing.state import require_routing_state

__all__ = ["RoutingMetricsCallback", "logged_routing"]

PREFIX = "routing_"


class RoutingMetricsCallback(TrainerCallback):
    """Logs how the routers of a model spread their choices, under any transformers or TRL trainer.

    The keys stand beside `loss` in the trainer's log history. Trackers of `report_to` run before the callbacks that a
    trainer is given, so a tracker sees them only if this one is put first:
    `trainer.callback_handler.callbacks.insert(0, RoutingMetricsCallback())`.

    Example:
        `Trainer(model=model, args=args, train_dataset=data, callbacks=[RoutingMetricsCallback()])`
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Look for routers before time is spent.

        Args:
            args: arguments of the trainer.
            state: its state.
            control: its control.
            model: the model that is trained.
            **kwargs: what else the trainer gives.

        Raises:
            RoutingError: if the model has no moe_kit routers.
        """
        assert model is not None, "a trainer gives its model to every callback"
        require_routing_state(model)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to a line with a training loss.

        Args:
            args: arguments of the trainer.
            state: its state; the last line of its `log_history` is this one.
            control: its control.
            model: the model that is trained.
            logs: what is logged; changed in place, for the callbacks that follow.
            **kwargs: what else the trainer gives.
        """
        if model is None or not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        # RoutedTrainer has logged them already
        if any(name.startswith(PREFIX) for name in logs):
            return
        found = logged_routing(model)
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)


def logged_routing(model: nn.Module) -> dict[str, float]:
    """Routing metrics of the last forward pass under the names of a log.

    Args:
        model: a model with moe_kit routers.

    Returns:
        At most twelve finite floats; without those that this routing has no value for (the entropy of forced experts).

    Raises:
        RoutingError: if the model has no moe_kit routers.
    """
    return {PREFIX + name: value for name, value in routing_metrics(model).items() if math.isfinite(value)}
