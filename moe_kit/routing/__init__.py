"""Routing decisions: what they are, how they are made, balanced, sampled, recorded and replayed.

This package imports no Hugging Face code.
"""

from moe_kit.routing.context import RoutingContext
from moe_kit.routing.decision import Routing
from moe_kit.routing.metrics import routing_metrics
from moe_kit.routing.policy import plackett_luce_log_prob, plackett_luce_set_log_prob, rloo_loss
from moe_kit.routing.router import Router
from moe_kit.routing.state import (
    ModelRouting,
    force_experts,
    policy_gradient,
    record_routing,
    replay_routing,
    routing_inputs,
    routing_losses,
    weighted_routing_loss,
)
from moe_kit.routing.step import StepState, install_step_hook, routing_step

__all__ = [
    "ModelRouting",
    "Router",
    "Routing",
    "RoutingContext",
    "StepState",
    "force_experts",
    "install_step_hook",
    "plackett_luce_log_prob",
    "plackett_luce_set_log_prob",
    "policy_gradient",
    "record_routing",
    "replay_routing",
    "rloo_loss",
    "routing_inputs",
    "routing_losses",
    "routing_metrics",
    "routing_step",
    "weighted_routing_loss",
]
