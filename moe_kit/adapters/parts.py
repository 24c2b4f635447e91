"""Names in a configuration -> parts of a router and a bank.

Each table maps a name to a builder that reads the configuration and the sizes of one linear. A new method adds one
small part and one line here, never a new layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from moe_kit.adapters.config import RoutedAdapterConfig, suggestion
from moe_kit.errors import ConfigError
from moe_kit.experts.bank import Bank
from moe_kit.experts.lora import LoRABank
from moe_kit.routing.balance import LOSSES
from moe_kit.routing.router import Router
from moe_kit.routing.scope import RequestScope, Scope, SequenceScope, TaskScope, TokenScope
from moe_kit.routing.score import LinearScore, MLPScore, TaskTableScore
from moe_kit.routing.select import SelectAll, SelectSampleK, SelectTopK
from moe_kit.routing.weight import (
    ConstantWeight,
    RawWeight,
    SelectedSoftmaxWeight,
    SigmoidWeight,
    SoftmaxWeight,
    Weight,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one adapted linear after the patterns were applied.

    Attributes:
        width_in: D.
        width_out: O.
        num_experts: E.
        rank: L.
    """

    width_in: int
    width_out: int
    num_experts: int
    rank: int


Builder = Callable[[RoutedAdapterConfig, Sizes], Any]

SCOPES: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], Scope]] = {
    "token": lambda config, sizes: TokenScope(),
    "sequence": lambda config, sizes: SequenceScope(**config.scope_options),
    "request": lambda config, sizes: RequestScope(**config.scope_options),
    "task": lambda config, sizes: TaskScope(config.num_tasks),
}
SCORES: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], nn.Module]] = {
    "linear": lambda config, sizes: LinearScore(sizes.width_in, sizes.num_experts, **config.score_options),
    "mlp": lambda config, sizes: MLPScore(sizes.width_in, sizes.num_experts, **config.score_options),
    "task_table": lambda config, sizes: TaskTableScore(config.num_tasks, sizes.num_experts, **config.score_options),
}
SELECTIONS: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], nn.Module]] = {
    "all": lambda config, sizes: SelectAll(),
    "top_k": lambda config, sizes: SelectTopK(config.top_k, **config.select_options),
    "sample_k": lambda config, sizes: SelectSampleK(config.top_k, **config.select_options),
}
WEIGHTS: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], Weight]] = {
    "softmax": lambda config, sizes: SoftmaxWeight(),
    "selected_softmax": lambda config, sizes: SelectedSoftmaxWeight(),
    "sigmoid": lambda config, sizes: SigmoidWeight(**config.weight_options),
    "indicator": lambda config, sizes: ConstantWeight(1.0),
    "constant": lambda config, sizes: ConstantWeight(**config.weight_options),
    "remix": lambda config, sizes: ConstantWeight(remix_weight(config.top_k, sizes.rank, config.use_rslora)),
    "raw": lambda config, sizes: RawWeight(),
}
BANKS: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], Bank]] = {
    "lora": lambda config, sizes: LoRABank(
        sizes.width_in,
        sizes.width_out,
        sizes.num_experts,
        sizes.rank,
        scale=lora_scale(config, sizes.rank),
        dropout=config.dropout,
        **config.bank_options,
    ),
}
STEPPERS: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], nn.Module]] = {}


def remix_weight(top_k: int, rank: int, use_rslora: bool) -> float:
    """ReMix's constant weight: 2/(k r), or 2/(k sqrt r)'s square-root form 2/sqrt(k r).

    Args:
        top_k: k.
        rank: r.
        use_rslora: the square-root form, which the paper's stronger results use.
    """
    return 2 / math.sqrt(top_k * rank) if use_rslora else 2 / (top_k * rank)


def lora_scale(config: RoutedAdapterConfig, rank: int) -> float:
    """Multiplier of the mixture: `scale` if set, else alpha / r or alpha / sqrt(r)."""
    if config.scale is not None:
        return config.scale
    return config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)


def sizes_of(config: RoutedAdapterConfig, path: str, width_in: int, width_out: int) -> Sizes:
    """Sizes of the adapter of one linear.

    Args:
        config: the configuration.
        path: module path of the linear; the patterns are matched against it.
        width_in: D.
        width_out: O.
    """
    experts = _matched(config.expert_pattern, path, config.num_experts)
    return Sizes(width_in, width_out, experts, _matched(config.rank_pattern, path, config.r))


def build_bank(config: RoutedAdapterConfig, sizes: Sizes) -> Bank:
    """The bank of one linear.

    Raises:
        ConfigError: if the configuration names an unknown bank or option.
    """
    return _build(BANKS, "bank", config.bank, config, sizes)


def build_router(config: RoutedAdapterConfig, sizes: Sizes) -> Router:
    """The router of one group of linears.

    Raises:
        ConfigError: if the configuration names an unknown part or option.
    """
    losses = {name: (coefficient, _named(LOSSES, "losses", name)) for name, coefficient in config.losses.items()}
    stepper = None if config.stepper is None else _build(STEPPERS, "stepper", config.stepper, config, sizes)
    return Router(
        sizes.num_experts,
        scope=_build(SCOPES, "scope", config.scope, config, sizes),
        score=_build(SCORES, "score", config.score, config, sizes),
        select=_build(SELECTIONS, "select", config.select, config, sizes),
        weight=_build(WEIGHTS, "weight", config.weight, config, sizes),
        losses=losses,
        detach_input=config.detach_router_input,
        stepper=stepper,
    )


def _matched(patterns: dict[str, int], path: str, default: int) -> int:
    for pattern, value in patterns.items():
        if re.search(rf"(^|\.){pattern}$", path) or re.search(rf"(^|\.){pattern}(\.|$)", path):
            return value
    return default


def _named(table: Mapping[str, T], field: str, name: str) -> T:
    if name not in table:
        raise ConfigError(f"{field} is {name!r}, which does not exist.{suggestion(name, list(table))}")
    return table[name]


def _build(table: Mapping[str, Builder], field: str, name: str, config: RoutedAdapterConfig, sizes: Sizes) -> Any:
    builder = _named(table, field, name)
    try:
        return builder(config, sizes)
    except TypeError as error:
        raise ConfigError(f"{field}_options do not fit {field} = {name!r}: {error}.") from error
