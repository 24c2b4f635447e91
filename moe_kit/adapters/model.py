"""`RoutedAdapterModel`: PEFT's tuner for routed adapters."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, NoMatchingPeftModuleError, replicate_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import _get_submodules
from torch import Tensor, nn

from moe_kit.adapters.base_experts import AdaptedExperts
from moe_kit.adapters.combine import combined_config, fill_combined
from moe_kit.adapters.config import ALL_LINEAR, RoutedAdapterConfig
from moe_kit.adapters.external import fill_experts, read_adapters
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.adapters.mixed_batch import rows_with_adapters
from moe_kit.adapters.targets import (
    all_linears,
    check_patterns,
    check_quantised,
    describe,
    expert_parameters,
    is_linear,
    nothing_matched,
    untried_linears,
)
from moe_kit.errors import CheckpointError, ConfigError, RoutingError
from moe_kit.hf.delivery import announce
from moe_kit.hf.generation import note_generate
from moe_kit.hf.hooks import attach, detach
from moe_kit.hf.module_names import name_by_path
from moe_kit.hf.registration import register
from moe_kit.hf.sharing import router_group
from moe_kit.routing.step import track

logger = logging.getLogger(__name__)

_CONTAINER = re.compile(r"\.(moe_adapter_bank|moe_adapter_router)\.")


class RoutedAdapterModel(BaseTuner):
    """Wraps the linears of a model with routed adapters, and on request the experts of its base with a LoRA each.

    Made by `peft.get_peft_model(model, RoutedAdapterConfig(...))`.
    """

    prefix: str = "moe_adapter_"
    tuner_layer_cls = (RoutedLayer, AdaptedExperts)
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see PEFT's `BaseTuner.inject_adapter`.

        Args:
            model: the inner model.
            adapter_name: name of the adapter.
            *args: as for PEFT.
            **kwargs: as for PEFT.

        Raises:
            ConfigError: if nothing matches, or the configuration does not fit the other adapters.
        """
        config = self.peft_config[adapter_name]
        imported = read_adapters(config)
        self._replicate_layers(config, adapter_name, model)
        config.check_model(model)
        self._check_balance_scope(config, adapter_name)
        if config.target_parameters:
            config.target_parameters = expert_parameters(model, config)
            # PEFT would fill in its defaults
            config.target_modules = config.target_modules or []
            logger.info("%s adapts the base's experts: %s", adapter_name, describe(config.target_parameters))
        if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
            config.target_modules = all_linears(model, config)
            # the paths name the layers already
            config.layers_to_transform = config.layers_pattern = None
            logger.info("%s adapts %s", adapter_name, describe(config.target_modules))
        name_by_path(model, config)
        state = attach(model)
        track(model)
        # routers of this adapter by sharing group, filled as linears are visited
        self.__dict__.setdefault("_router_owners", {})[adapter_name] = {}
        try:
            with warnings.catch_warnings():
                if config.target_parameters:
                    # PEFT compares patterns with linears only, and would call those of experts ignored
                    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except (NoMatchingPeftModuleError, ConfigError) as error:
            if not _is_routed(model):
                detach(model)
            if isinstance(error, ConfigError):
                raise
            raise nothing_matched(model, config) from error
        if state.carries:
            note_generate(model)
        state.balances_globally = config.balance_scope == "global"
        if config.losses:
            announce(model)
        if imported:
            fill_experts(model, adapter_name, config, imported)

    def _prepare_model(self, peft_config: RoutedAdapterConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        untried = untried_linears(model)
        patterns = peft_config.expert_pattern or peft_config.rank_pattern or peft_config.alpha_pattern
        if not (untried or patterns):
            return
        # PEFT has filled in its default targets, and has not changed the model yet
        linears = [
            path
            for path, module in model.named_modules()
            if path and is_linear(module) and self._check_target_module_exists(peft_config, path)
        ]
        check_quantised(model, linears, untried)
        # where nothing is adapted at all, that is what will be said
        if linears or peft_config.target_parameters:
            check_patterns(model, linears, peft_config)

    def _replicate_layers(self, config: RoutedAdapterConfig, adapter_name: str, model: nn.Module) -> None:
        # before targets are looked for: PEFT does it too late for paths, and once more for each adapter
        others = [other for name, other in self.peft_config.items() if name != adapter_name]
        given = [_pairs(getattr(other, "layer_replication", None)) for other in others]
        if config.layer_replication and not given:
            replicate_layers(model, config.layer_replication)
        elif config.layer_replication and _pairs(config.layer_replication) not in given:
            raise ConfigError(
                f"layer_replication of {adapter_name!r} is {config.layer_replication!r}, but the model has adapters already "
                f"({', '.join(name for name in self.peft_config if name != adapter_name)}), whose layers it would change: "
                "replicate with the first adapter, and give later ones the same layer_replication or none."
            )

    # PEFT's own for LoRA: it writes the tied modules into the configuration
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _add_targets_to_tie(self, peft_config: RoutedAdapterConfig, tied_weight_keys: list[str]) -> None:
        # PEFT would warn and adapt one of the two
        raise ConfigError(
            f"ensure_weight_tying is set and target_modules = {peft_config.target_modules!r} adapts an embedding or what is tied "
            f"to it ({', '.join(sorted(tied_weight_keys))}): routed adapters go on linears, so the two cannot be tied. Leave "
            "ensure_weight_tying unset, or train both in full with modules_to_save."
        )

    def _check_balance_scope(self, config: RoutedAdapterConfig, adapter_name: str) -> None:
        for name, other in self.peft_config.items():
            if name != adapter_name and getattr(other, "balance_scope", config.balance_scope) != config.balance_scope:
                raise ConfigError(
                    f"balance_scope of {adapter_name!r} is {config.balance_scope!r}, but {name!r} on the same model has "
                    f"{other.balance_scope!r}: give both the same."
                )

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
        if peft_config.router_sharing == "model":
            # a tower sees tokens of its own, and so do the sides of a pair of models that name their layers alike
            structure = attach(self.model).structure
            group += structure.tower(current_key) + "#source" * structure.is_encoders(current_key)
        inference_mode = adapter_name not in self.active_adapters
        if isinstance(target, RoutedLayer):
            layer = target
        else:
            layer = RoutedLayer(target, attach(self.model), current_key)
        layer.update_layer(adapter_name, peft_config, owners.get(group), inference_mode)
        owners.setdefault(group, layer)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(
        self, peft_config: RoutedAdapterConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        # PEFT's own wraps a module once for each of its weights, and refuses a wrapper that is not LoRA's
        modules: dict[str, list[str]] = {}
        for full_name in peft_config.target_parameters or ():
            path, _, name = full_name.rpartition(".")
            modules.setdefault(path, []).append(name)
        for path, names in modules.items():
            parent, target, target_name = _get_submodules(model, path)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                layer = target if isinstance(target, AdaptedExperts) else AdaptedExperts(target, path)
                layer.update_layer(adapter_name, peft_config, names, adapter_name not in self.active_adapters)
            if layer is not target:
                self._replace_module(parent, target_name, layer, target)
        return list(peft_config.target_parameters or ())

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would also hand `weight` from the one to the other, which experts and quantised linears do not have, and
        # look for a device by it: an adapter goes to its base's by itself
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        # before PEFT has merged half of the model
        for module in self.model.modules():
            if isinstance(module, RoutedLayer):
                module.merge()
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise RoutingError(
                "replicated layers share their weights (layer_replication), so an adapter of one of them cannot be merged: "
                "keep the adapter."
            )
        super()._check_merge_allowed()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # around `forward` and `generate` of a PeftModel
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else rows_with_adapters(self.model, self.tuner_layer_cls, names, kwargs):
            yield

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter that is the weighted sum of others, where routed experts have one; see `combine`.

        Args:
            adapters: names of the adapters; their routers must be equal.
            weights: one for each, negative ones subtract.
            adapter_name: name of the new adapter, which stays inactive.
            combination_type: "cat" puts the ranks of each expert side by side and is exact; "linear" adds the factors of
                equal rank, as PEFT's does, and is rough.

        Raises:
            RoutingError: if the sum is no adapter, or a name does not fit.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or adapter_name in self.peft_config:
            taken = f" {adapter_name!r} exists already." if adapter_name in self.peft_config else ""
            raise RoutingError(
                f"got adapters {adapters} for a new {adapter_name!r}, expected names among {sorted(self.peft_config)} and a "
                f"name that is free.{taken}"
            )
        configs = {name: self.peft_config[name] for name in adapters}
        if len(configs) < len(adapters):
            raise RoutingError(f"adapters {adapters} name one twice: give it once, with the sum of its weights.")
        self.peft_config[adapter_name] = combined_config(self.model, configs, weights, combination_type)
        self.inject_adapter(self.model, adapter_name)
        fill_combined(self.model, adapters, weights, adapter_name, combination_type)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the last one takes layers, hooks and what was announced with it.

        Args:
            adapter_name: its name.
        """
        super().delete_adapter(adapter_name)
        # `unload` would take another method's layers off as well
        tuned = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        if not self.peft_config and all(isinstance(module, self.tuner_layer_cls) for module in tuned):
            self.unload()
            self.model.peft_config = self.peft_config

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        # behind `unload` and `merge_and_unload` alike: hooks and what was announced go with the adapters
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        if not _is_routed(model):
            detach(model)
        return model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        # PEFT's own layers have the base's dtype before this; ours start in float32, and routers stay there
        for module in self.model.modules():
            if isinstance(module, (RoutedLayer, AdaptedExperts)):
                module.cast_bank(adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: RoutedAdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state(model, adapter_name, remapped)
        return remapped

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # the name stands right behind the container, at any depth of what follows
        match = _CONTAINER.search(key)
        if match is None:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        head, tail = key[: match.end()], key[match.end() :]
        return head + tail.removeprefix(adapter_name + ".")


def _pairs(replication: Any) -> list[tuple[int, int]] | None:
    # JSON has lists where a user wrote tuples
    return None if replication is None else [tuple(pair) for pair in replication]


def _is_routed(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def check_state(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of this adapter on this model; loading would skip them in silence.

    Args:
        model: the model with the adapter in place.
        adapter_name: name of the adapter.
        state: weights by their name in the model.

    Raises:
        CheckpointError: if weights are missing, foreign, or of other sizes.
    """
    everything = model.state_dict()
    own = {
        name: value
        for name, value in everything.items()
        if (match := _CONTAINER.search(name)) and name[match.end() :].startswith(adapter_name + ".")
    }
    missing = sorted(own.keys() - state.keys())
    # a module of the base that is saved with the adapter may have any name
    foreign = sorted(n for n in state.keys() - everything.keys() if ".moe_adapter_" in n or ".lora_" in n)
    # a scalar of an older file is a vector of one element now
    other = [name for name in own.keys() & state.keys() if own[name].shape != torch.atleast_1d(state[name]).shape]
    if not (missing or foreign or other):
        return
    what = []
    if missing:
        what.append(f"lacks {len(missing)} of {len(own)} weights (first: {missing[0]})")
    if foreign:
        what.append(f"has {len(foreign)} that the model has not (first: {foreign[0]})")
    if other:
        name = min(other)
        sizes = f"{list(state[name].shape)}, expected {list(own[name].shape)}"
        what.append(f"has {len(other)} of other sizes (first: {name} is {sizes})")
    raise CheckpointError(
        f"the file of adapter {adapter_name!r} does not fit this {type(model).__name__}: it {'; '.join(what)}. It belongs "
        "to another base model or another configuration, or was cut off: load it on the base it was trained on."
    )


register("MOE_ADAPTER", RoutedAdapterConfig, RoutedAdapterModel)
