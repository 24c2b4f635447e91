"""Which linears of a model are adapted: `"all-linear"` resolved by ourselves, and what is said when nothing matches.

`"all-linear"` means the linears that every token passes once: attention and feed-forward of each layer. It leaves out
the output head (PEFT's rule), a base mixture's router, and the linears of single base experts, which see a share of
the tokens that depends on the routing. Each of those is adapted when it is named: linears in `target_modules`, stacked
expert weights in `target_parameters`.
"""

from __future__ import annotations

import logging
from collections import Counter
from copy import copy
from itertools import pairwise
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moe_kit.adapters.base_experts import AdaptedExperts
from moe_kit.adapters.config import RoutedAdapterConfig, layout_pattern
from moe_kit.adapters.layer import linear_widths
from moe_kit.errors import ConfigError, RoutingError
from moe_kit.hf.experts import is_experts, stacked_weights
from moe_kit.hf.fields import suggestion

logger = logging.getLogger(__name__)

_ROUTERS = {"gate", "router", "shared_expert_gate"}
_HEADS = ("score", "classifier", "classification_head", "qa_outputs")

# quantisers whose linears the tests try, by transformers' names; docs/quantised.md has the table
_TRIED = ("awq", "bitsandbytes", "gptq", "hqq", "quanto", "torchao")
# linears of quantisers that leave no note in the configuration
_UNNOTED = {"PatchedLinear": "inc"}


def is_linear(module: nn.Module) -> bool:
    """Whether routed adapters can go on a module: linears, transformers' Conv1D, quantised linears, adapted linears.

    Args:
        module: any module.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, (nn.Linear, Conv1D)):
        return True
    if "linear" not in type(base).__name__.lower():
        return False
    try:
        linear_widths(base)
    except RoutingError:
        return False
    return True


def all_linears(model: nn.Module, config: RoutedAdapterConfig) -> list[str]:
    """Paths that `"all-linear"` stands for.

    Args:
        model: the inner model, with or without adapters.
        config: its `layers_to_transform` and `exclude_modules` are obeyed; it may exclude more than this function.

    Returns:
        Paths in the model's order.

    Raises:
        ConfigError: if there is none; the linears of the model are listed.
    """
    skipped = _heads(model)
    for path, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, nn.MultiheadAttention)):
            # inside lie parts of an adapter, or a projection that is never called as a module
            skipped |= {f"{path}.{name}" for name, _ in module.named_modules() if name}
    paths = [path for path, module in model.named_modules() if is_linear(module) and path not in skipped]
    of_base_mixture = [path for path in paths if _belongs_to_base_mixture(path, model)]
    paths = [path for path in paths if path not in set(of_base_mixture)]
    if config.layers_to_transform is not None:
        paths = [path for path in paths if _layer_of(path, config.layers_pattern) in _layers(config)]
    if not paths:
        raise nothing_matched(model, config)
    if of_base_mixture or _has_expert_parameters(model):
        logger.warning(
            "all-linear on a mixture-of-experts base adapts %s; its router and its experts are left alone%s%s.",
            describe(paths),
            f" ({describe(of_base_mixture)}: name them to adapt them)" if of_base_mixture else "",
            "" if config.target_parameters else " (target_parameters adapts its experts)",
        )
    return paths


def expert_parameters(model: nn.Module, config: RoutedAdapterConfig) -> list[str]:
    """Stacked expert weights that `target_parameters` names.

    A name stands for every weight whose path is it or ends in it, as PEFT matches; `layers_to_transform` is obeyed.

    Args:
        model: the inner model, with or without adapters.
        config: its `target_parameters` are set.

    Returns:
        Full names without the wrappers of adapters, in the model's order.

    Raises:
        ConfigError: if a name matches none; the nearest is suggested. Also if another method wraps the experts.
    """
    known, wrapped = [], []
    for path, module in model.named_modules():
        outer = path.removesuffix(".base_layer")
        if outer == path or isinstance(model.get_submodule(outer), AdaptedExperts):
            known += [f"{outer}.{name}" for name in stacked_weights(module)]
        elif stacked_weights(module):
            wrapped.append(outer)
    wanted = config.target_parameters or []
    for name in wanted:
        if any(_ends_in(path, name) for path in known):
            continue
        if wrapped:
            raise ConfigError(
                f"target_parameters names {name!r}, but another method wraps these experts already ({wrapped[0]}): "
                "adapt them by one method."
            )
        names = sorted({".".join(path.rsplit(".", 2)[1:]) for path in known})
        closed = (
            sorted({type(module).__name__ for module in model.modules() if is_experts(module)}) if not known else []
        )
        if closed:
            raise ConfigError(
                f"target_parameters names {name!r}, but the stacks of {', '.join(closed)} cannot be adapted as they are: they "
                "are quantised, or sharded tensors. Load the base unquantised and wrap it before it is distributed, or adapt "
                "linears alone (target_modules)."
            )
        hint = suggestion(name, names) if names else ""
        raise ConfigError(
            f"target_parameters names {name!r}, which is no stacked expert weight of this {type(model).__name__}."
            f"{hint if 'mean' in hint else ''} Such weights: {', '.join(names) or 'none'}."
        )
    found = [path for path in known if any(_ends_in(path, name) for name in wanted)]
    if config.layers_to_transform is not None:
        found = [path for path in found if _layer_of(path, config.layers_pattern) in _layers(config)]
        if not found:
            raise ConfigError(
                f"target_parameters = {wanted!r} matches nothing in layers {config.layers_to_transform}: no experts there."
            )
    return found


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _layers(config: RoutedAdapterConfig) -> set[int]:
    wanted = config.layers_to_transform
    return {wanted} if isinstance(wanted, int) else set(wanted or ())


def describe(paths: list[str]) -> str:
    """Count linears by name.

    Args:
        paths: module paths.

    Returns:
        Text such as "q_proj (30), k_proj (30)".
    """
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def nothing_matched(model: nn.Module, config: RoutedAdapterConfig) -> ConfigError:
    """The error for a configuration that matches no linear.

    Args:
        model: the inner model.
        config: the configuration.

    Returns:
        An error that lists the linears there are and suggests the nearest name.
    """
    # a linear that has an adapter already is named once, by its own name
    linears = [
        path
        for path, module in model.named_modules()
        if path and is_linear(module) and not path.endswith(".base_layer")
    ]
    targets: Any = config.target_modules
    excluded = _without_exclusion(linears, config)
    if excluded:
        kept = f" and modules_to_save = {config.modules_to_save!r}" if config.modules_to_save else ""
        return ConfigError(
            f"exclude_modules = {config.exclude_modules!r}{kept} leave nothing of what target_modules match in this "
            f"{type(model).__name__}: {describe(excluded)} would be adapted without. Exclude less, or target more."
        )
    names = sorted({path.rpartition(".")[2] for path in linears})
    hint = ""
    if isinstance(targets, (list, tuple, set)):
        unknown = [name for name in targets if name.rpartition(".")[2] not in names]
        hint = suggestion(unknown[0].rpartition(".")[2], names) if unknown else ""
    where = "" if config.layers_to_transform is None else f" in layers {config.layers_to_transform}"
    return ConfigError(
        f"target_modules = {targets!r} matches no linear of this {type(model).__name__}{where}."
        f"{hint if 'mean' in hint else ''} Its linears: {', '.join(names) or 'none'}."
    )


def _without_exclusion(linears: list[str], config: RoutedAdapterConfig) -> list[str]:
    """Linears that the targets alone match, if something is excluded at all."""
    if not (config.exclude_modules or config.modules_to_save):
        return []
    free = copy(config)
    free.exclude_modules = free.modules_to_save = None
    return [path for path in linears if check_target_module_exists(free, path)]


def untried_linears(model: nn.Module) -> dict[str, str]:
    """Linears in a quantised format that routed adapters were never tried on.

    Args:
        model: the inner model.

    Returns:
        Path -> name of the quantiser. A linear that it left alone is as good as any.
    """
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    given = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = getattr(given, "value", given)
    found = {}
    for path, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        name = _UNNOTED.get(type(base).__name__, method)
        if name is not None and name not in _TRIED and is_linear(base) and not _is_whole(base):
            found[path] = name
    return found


def _is_whole(linear: nn.Module) -> bool:
    weight = getattr(linear, "weight", None)
    return type(linear) in (nn.Linear, Conv1D) and weight is not None and weight.is_floating_point()


def check_quantised(model: nn.Module, linears: list[str], untried: dict[str, str]) -> None:
    """Refuse linears in a quantised format that was never tried.

    Args:
        model: the inner model.
        linears: paths of the linears that the configuration adapts.
        untried: as `untried_linears` gives them.

    Raises:
        ConfigError: naming the first.
    """
    for path in linears:
        if path in untried:
            raise ConfigError(
                f"{path} is a {type(model.get_submodule(path)).__name__}, quantised by {untried[path]!r}, on which routed "
                f"adapters were never tried; they were on {', '.join(_TRIED)}. Load the base quantised by one of these or "
                "unquantised (dequantize=True, where its quantization_config has it), or target linears that were left whole."
            )


def check_patterns(model: nn.Module, linears: list[str], config: RoutedAdapterConfig) -> None:
    """Refuse patterns that no adapted module matches: the user meant something by them.

    Args:
        model: the inner model.
        linears: paths of the linears that the configuration adapts.
        config: its `expert_pattern`, `rank_pattern` and `alpha_pattern` are compared as PEFT does; what `expert_layout` added may match
            none, where only some layers are adapted. The ranks of `target_parameters` count too.

    Raises:
        ConfigError: naming the pattern, and the modules there are.
    """
    added = layout_pattern(model, config.expert_layout) if config.expert_layout else {}
    given = [pattern for pattern in config.expert_pattern if pattern not in added]
    ranked = [*linears, *(config.target_parameters or ())]
    for field, patterns, paths in (
        ("expert_pattern", given, linears),
        ("rank_pattern", config.rank_pattern, ranked),
        ("alpha_pattern", config.alpha_pattern, ranked),
    ):
        for pattern in patterns:
            if any(get_pattern_key([pattern], path) == pattern for path in paths):
                continue
            hint = suggestion(pattern.rpartition(".")[2], sorted({path.rpartition(".")[2] for path in paths}))
            raise ConfigError(
                f"{field} has {pattern!r}, which matches no module that is adapted.{hint if 'mean' in hint else ''} It is a "
                "regular expression for the end of a path, or for the whole of it: 'layers.0.*' is a layer. Adapted: "
                f"{describe(paths) or 'none'}."
            )


def _heads(model: nn.Module) -> set[str]:
    """Output heads: the language model's, or the classifier at the top."""
    if not isinstance(model, PreTrainedModel):
        return set()
    head = model.get_output_embeddings()
    if head is not None:
        return {path for path, module in model.named_modules() if module is head}
    tops = [name for name in _HEADS if hasattr(model, name)]
    return {
        path for path, _ in model.named_modules() if any(path == name or path.startswith(name + ".") for name in tops)
    }


def _belongs_to_base_mixture(path: str, model: nn.Module) -> bool:
    parts = path.split(".")
    if "experts" in parts or "router" in parts:
        return True
    return parts[-1] in _ROUTERS and _has_experts(model)


def _has_experts(model: nn.Module) -> bool:
    return any("experts" in path.split(".") for path, _ in model.named_modules()) or _has_expert_parameters(model)


def _has_expert_parameters(model: nn.Module) -> bool:
    """Base experts stacked in one three-dimensional parameter, as transformers 5 keeps them."""
    return any("experts" in name.split(".") and value.dim() == 3 for name, value in model.named_parameters())


def _layer_of(path: str, pattern: list[str] | str | None) -> int | None:
    """Index of the layer that a path lies in: the first number, or the one behind a named list."""
    parts = path.split(".")
    names = [pattern] if isinstance(pattern, str) else pattern
    for before, part in pairwise(parts):
        if part.isdigit() and (not names or before in names):
            return int(part)
    return None
