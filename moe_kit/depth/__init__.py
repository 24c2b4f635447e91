"""Layer routers: skip, execute, repeat or approximate decoder layers, for a sequence or a token."""

from moe_kit.depth.calibrate import calibrate_budget
from moe_kit.depth.config import LayerRoutingConfig
from moe_kit.depth.model import LayerRoutingModel
from moe_kit.depth.steer import force_layers, layer_applications, set_budget

__all__ = [
    "LayerRoutingConfig",
    "LayerRoutingModel",
    "calibrate_budget",
    "force_layers",
    "layer_applications",
    "set_budget",
]
