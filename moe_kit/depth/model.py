"""`LayerRoutingModel`: PEFT's tuner for layer routers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from moe_kit.depth.config import EXECUTE, SKIP, LayerRoutingConfig
from moe_kit.depth.hooks import attach_depth, detach_depth
from moe_kit.depth.routers import FixedRouter, fixed_layers
from moe_kit.depth.swap import swap_in, swap_out
from moe_kit.depth.unit import DepthUnit
from moe_kit.errors import ConfigError, RoutingError
from moe_kit.hf.delivery import announce
from moe_kit.hf.hooks import detach
from moe_kit.hf.layers import UNIT, DecoderLayers, find_attention, find_decoder_layers, find_mlp, text_config
from moe_kit.hf.module_names import name_by_path
from moe_kit.hf.registration import register

_CONTAINER = re.compile(r"\.(moe_depth_router|moe_depth_forecaster)\.")


def routed_layers(config: LayerRoutingConfig, found: DecoderLayers) -> list[int]:
    """Indices of the layers that a configuration routes.

    Args:
        config: the configuration.
        found: the model's decoder layers.

    Returns:
        Ascending indices.

    Raises:
        ConfigError: if an index is out of range or nothing is left to route.
    """
    count = len(found.layers)
    for name in ("layers", "skip_layers", "skip_order"):
        bad = [index for index in getattr(config, name) or [] if not 0 <= index < count]
        if bad:
            raise ConfigError(f"{name} names {bad}, but the model has layers 0 to {count - 1}.")
    if config.layers is not None:
        chosen = sorted(config.layers)
    else:
        chosen = [
            index for index in range(count) if index not in found.anchors and index >= round(config.start * count)
        ]
    if not chosen:
        raise ConfigError(
            f"no layer is left to route: the model has {count}, layers {list(found.anchors)} stay unrouted by default "
            f"and start = {config.start} leaves out the lower ones. Name layers explicitly or lower start."
        )
    missing = sorted(set(config.skip_layers or []) - set(chosen))
    if missing:
        raise ConfigError(f"skip_layers names {missing}, which are not routed; routed are {chosen}.")
    if config.skip_order is not None and sorted(config.skip_order) != chosen:
        raise ConfigError(f"skip_order is {config.skip_order}, expected every routed layer once: {chosen}.")
    return chosen


class LayerRoutingModel(BaseTuner):
    """Puts layer routers into a model.

    Made by `peft.get_peft_model(model, LayerRoutingConfig(...))`.
    """

    prefix: str = "moe_depth_"
    tuner_layer_cls = DepthUnit
    target_module_mapping: dict = {}

    def _pre_injection_hook(self, model: nn.Module, config: LayerRoutingConfig, adapter_name: str) -> None:
        self._targets(model, config)
        name_by_path(model, config)

    def _targets(self, model: nn.Module, config: LayerRoutingConfig) -> dict[str, tuple[str, int]]:
        """Module path -> (kind, layer) of the modules that get a unit."""
        found = find_decoder_layers(model)
        targets: dict[str, tuple[str, int]] = {}
        for index in routed_layers(config, found):
            path, layer = found.layer_path(index), found.layers[index]
            blocks = config.scope == "token" and config.units == "layer"
            if config.units == "layer":
                targets[path] = ("layer", index)
            if config.units in ("attention", "sub_layer") or blocks:
                targets[f"{path}.{find_attention(layer)}"] = ("attention", index)
            if config.units in ("mlp", "sub_layer") or blocks:
                targets[f"{path}.{find_mlp(layer)}"] = ("mlp", index)
        self.__dict__["_depth_targets"] = targets
        self.__dict__["_depth_found"] = found
        return targets

    def _prepare_adapter_config(self, peft_config: LayerRoutingConfig, model_config: dict) -> LayerRoutingConfig:
        self._targets(self.model, peft_config)
        if peft_config.router == "fixed" and peft_config.skip_layers is not None:
            # what the named layers amount to
            peft_config.budget = len(peft_config.skip_layers) / len(routed_layers(peft_config, self._depth_found))
        return peft_config

    def _check_target_module_exists(self, peft_config: LayerRoutingConfig, key: str) -> bool:
        return key in self._depth_targets

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Every found module fits."""

    def _create_and_replace(
        self,
        peft_config: LayerRoutingConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        found = self._depth_found
        state = attach_depth(self.model, len(found.layers), found.anchors)
        if peft_config.losses:
            announce(self.model)
        kind, index = self._depth_targets[current_key]
        state.configs[adapter_name] = peft_config
        units = state.units.setdefault(adapter_name, {})
        unit = target._modules.get(UNIT)
        if unit is None:
            layer = found.layers[index]
            slot = getattr(layer, find_attention(layer)).layer_idx
            unit = DepthUnit(state, kind, index, slot, current_key, text_config(self.model).hidden_size)
            unit.set_adapter(self.active_adapters)
            swap_in(target, unit)
        leader = units.get(index) if peft_config.scope == "token" and peft_config.units == "layer" else None
        leader = None if kind == "layer" else leader
        router = self._fixed(peft_config, index) if leader is None else None
        unit.update_layer(adapter_name, peft_config, router, leader)
        if leader is None:
            units[unit.column] = unit
        parameter = next((p for p in target.parameters() if not p.is_meta), None)
        if parameter is not None and not any(p.is_meta for p in unit.parameters()):
            unit.to(parameter.device)
        unit.set_adapter(self.active_adapters, inference_mode=adapter_name not in self.active_adapters)

    def _fixed(self, config: LayerRoutingConfig, index: int) -> FixedRouter | None:
        if config.router != "fixed":
            return None
        skipped = fixed_layers(config, routed_layers(config, self._depth_found))
        return FixedRouter(SKIP if index in skipped else EXECUTE)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        raise AssertionError("a layer router replaces no module")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            raise ConfigError("layer routes depend on the input and cannot be merged: call unload() to take them off.")
        for module in list(self.model.modules()):
            swap_out(module)
        detach_depth(self.model)
        if not any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            detach(self.model)
        return self.model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT hands `adapter_names` to the tuner and would not notice that nobody reads them
        if kwargs.get("adapter_names") is not None:
            raise RoutingError(
                "adapter_names (one adapter for each row) is not supported by layer routers: use one adapter a batch, or "
                "moe_kit.depth.force_layers to choose layers by row."
            )
        yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its columns; the last one takes units, hooks and what was announced with it."""
        super().delete_adapter(adapter_name)
        state = attach_depth(self.model, len(self._depth_found.layers), self._depth_found.anchors)
        state.units.pop(adapter_name, None)
        state.configs.pop(adapter_name, None)
        if not self.peft_config:
            self.unload()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # the name stands right behind the container, at any depth of what follows
        match = _CONTAINER.search(key)
        if match is None:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        head, tail = key[: match.end()], key[match.end() :]
        return head + tail.removeprefix(adapter_name + ".")


register("MOE_DEPTH", LayerRoutingConfig, LayerRoutingModel)
