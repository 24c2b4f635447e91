"""Routed adapters as a PEFT method: configuration, layer, tuner and presets."""

import moe_kit.adapters.optimizers  # noqa: F401  completes PEFT's
from moe_kit.adapters.collapse import collapse_to_lora
from moe_kit.adapters.config import RoutedAdapterConfig
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.adapters.model import RoutedAdapterModel
from moe_kit.adapters.transfer import copy_experts

__all__ = ["RoutedAdapterConfig", "RoutedAdapterModel", "RoutedLayer", "collapse_to_lora", "copy_experts"]
