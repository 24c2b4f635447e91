"""`RoutedAdapterModel`: PEFT's tuner for routed adapters."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from moe_kit.adapters.config import RoutedAdapterConfig
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.hf.hooks import attach, detach
from moe_kit.hf.registration import register
from moe_kit.hf.sharing import router_group
from moe_kit.routing.step import track

_CONTAINER = re.compile(r"\.(moe_adapter_bank|moe_adapter_router)\.")


class RoutedAdapterModel(BaseTuner):
    """Wraps the linears of a model with routed adapters.

    Made by `peft.get_peft_model(model, RoutedAdapterConfig(...))`.
    """

    prefix: str = "moe_adapter_"
    tuner_layer_cls = RoutedLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: RoutedAdapterConfig, adapter_name: str) -> None:
        attach(model)
        track(model)
        # routers of this adapter by sharing group, filled as linears are visited
        self.__dict__.setdefault("_router_owners", {})[adapter_name] = {}

    def _prepare_model(self, peft_config: RoutedAdapterConfig, model: nn.Module) -> None:
        peft_config.check_model(model)

    def _create_and_replace(
        self,
        peft_config: RoutedAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        owners = self._router_owners[adapter_name]
        group = router_group(current_key, peft_config.router_sharing)
        inference_mode = adapter_name not in self.active_adapters
        if isinstance(target, RoutedLayer):
            layer = target
        else:
            layer = RoutedLayer(target, attach(self.model), current_key)
        layer.update_layer(adapter_name, peft_config, owners.get(group), inference_mode)
        owners.setdefault(group, layer)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def unload(self) -> nn.Module:
        """Take the adapters off and return the base model, hooks removed.

        Returns:
            The base model as it was.
        """
        model = super().unload()
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            detach(model)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # the name stands right behind the container, at any depth of what follows
        match = _CONTAINER.search(key)
        if match is None:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        head, tail = key[: match.end()], key[match.end() :]
        return head + tail.removeprefix(adapter_name + ".")


register("MOE_ADAPTER", RoutedAdapterConfig, RoutedAdapterModel)
