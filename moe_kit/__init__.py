"""moe_kit: routed adapters, expert routers and layer routers for Hugging Face models.

Importing it registers the PEFT methods `MOE_ADAPTER` and `MOE_DEPTH` and the experts backend
`experts_implementation="moe_kit"` of transformers; kernels are loaded when first used.
"""

from importlib import import_module
from typing import Any

from moe_kit.adapters import RoutedAdapterConfig
from moe_kit.depth import LayerRoutingConfig
from moe_kit.errors import CheckpointError, ConfigError, KernelError, MoeKitError, RoutingError, TrainingError
from moe_kit.moe.experts_backend import register as _register_experts_backend
from moe_kit.routing import (
    Router,
    Routing,
    RoutingContext,
    force_experts,
    record_routing,
    replay_routing,
    routing_inputs,
    routing_losses,
    routing_metrics,
    routing_step,
)

__version__ = "0.1.0.dev0"

# loaded on first use: name -> module
_LAZY = {
    "load_adapters": "moe_kit.hf.saving",
    "save_adapters": "moe_kit.hf.saving",
    "RoutedTrainer": "moe_kit.training.trainer",
    "param_groups": "moe_kit.training.trainer",
    "RoutingMetricsCallback": "moe_kit.training.routing_log",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "KernelError",
    "LayerRoutingConfig",
    "MoeKitError",
    "RoutedAdapterConfig",
    "RoutedTrainer",
    "Router",
    "Routing",
    "RoutingContext",
    "RoutingError",
    "RoutingMetricsCallback",
    "TrainingError",
    "force_experts",
    "load_adapters",
    "param_groups",
    "record_routing",
    "replay_routing",
    "routing_inputs",
    "routing_losses",
    "routing_metrics",
    "routing_step",
    "save_adapters",
]

_register_experts_backend()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moe_kit' has no attribute {name!r}")
