"""Names in a configuration -> parts of a router and a bank.

Each table maps a name to a builder that reads the configuration and the sizes of one linear. A new method adds one
small part and one line here, never a new layer.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from peft.utils.other import get_pattern_key
from torch import nn

from moe_kit.adapters.config import RoutedAdapterConfig
from moe_kit.errors import ConfigError
from moe_kit.experts.bank import Bank
from moe_kit.experts.lora import LoRABank
from moe_kit.experts.rank_one import RankOneBank
from moe_kit.experts.shared_a import SharedABank
from moe_kit.experts.split_head import SplitHeadBank
from moe_kit.hf.fields import suggestion
from moe_kit.routing.balance import LOSSES, BalanceLoss, ReLUSparsityLoss
from moe_kit.routing.capacity import SelectCapacity
from moe_kit.routing.expert_choice import SelectEMAThreshold, SelectExpertChoice
from moe_kit.routing.loss_free import LossFreeBias
from moe_kit.routing.router import Router
from moe_kit.routing.schedule import TwoStageEntropy
from moe_kit.routing.scope import RequestScope, Scope, SequenceScope, TaskScope, TokenScope
from moe_kit.routing.score import (
    FrozenSparseScore,
    LinearScore,
    MLPScore,
    NoisyLinearScore,
    PrototypeScore,
    TaskTableScore,
    UniformScore,
)
from moe_kit.routing.select import SelectAll, SelectSampleK, SelectTopK
from moe_kit.routing.step import StepState
from moe_kit.routing.threshold import (
    ExcessWeight,
    SelectLearnedThreshold,
    SelectPositive,
    SelectTopP,
    SparsityController,
)
from moe_kit.routing.typed_balance import TypedCVLoss
from moe_kit.routing.weight import (
    ConstantWeight,
    CountScaledSoftmaxWeight,
    DenseMixerWeight,
    RawWeight,
    RelaxedBernoulliWeight,
    ReLUWeight,
    SelectedSoftmaxWeight,
    SigmoidWeight,
    SoftmaxWeight,
    StraightThroughWeight,
    Weight,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one adapted linear after the patterns were applied.

    Attributes:
        width_in: D.
        width_out: O.
        num_experts: experts of one group.
        rank: L.
        groups: groups of experts that are weighted on their own (heads of a split bank).
        alpha: what the mixture's scale is made from, unless the configuration sets the scale itself.
    """

    width_in: int
    width_out: int
    num_experts: int
    rank: int
    groups: int = 1
    alpha: float = 1.0

    @property
    def slots(self) -> int:
        """E as the router sees it: groups times experts of a group."""
        return self.groups * self.num_experts


Builder = Callable[[RoutedAdapterConfig, Sizes], Any]

SCOPES: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], Scope]] = {
    "token": lambda config, sizes: TokenScope(**config.scope_options),
    "sequence": lambda config, sizes: SequenceScope(**config.scope_options),
    "request": lambda config, sizes: RequestScope(**config.scope_options),
    "task": lambda config, sizes: TaskScope(config.num_tasks, **config.scope_options),
}
SCORES: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], nn.Module]] = {
    "linear": lambda config, sizes: LinearScore(sizes.width_in, sizes.slots, **config.score_options),
    "noisy_linear": lambda config, sizes: NoisyLinearScore(sizes.width_in, sizes.slots, **config.score_options),
    "mlp": lambda config, sizes: MLPScore(sizes.width_in, sizes.slots, **config.score_options),
    "prototype": lambda config, sizes: PrototypeScore(sizes.width_in, sizes.slots, **config.score_options),
    "frozen_sparse": lambda config, sizes: _projection(config, sizes),
    # the surveys' word: an expert's score is its own projection A x of the input as it is
    "identity": lambda config, sizes: _projection(config, sizes),
    "task_table": lambda config, sizes: TaskTableScore(config.num_tasks, sizes.slots, **config.score_options),
    "uniform": lambda config, sizes: UniformScore(sizes.slots, **config.score_options),
}


def _projection(config: RoutedAdapterConfig, sizes: Sizes) -> nn.Module:
    """The frozen A of rank-one experts, as dense as FlyLoRA has it unless told otherwise."""
    options: dict[str, Any] = {"density": min(1.0, config.top_k / sizes.slots)}
    if config.bank == "rank_one":
        # this A is the experts' own: dropout stands before it, where other banks have it before theirs
        options["dropout"] = config.dropout
    options |= config.score_options
    return FrozenSparseScore(sizes.width_in, sizes.slots, **options)


def _top_k(config: RoutedAdapterConfig, sizes: Sizes) -> nn.Module:
    select = SelectTopK(config.top_k, **config.select_options)
    select.check(sizes.slots)
    return select


def _expert_choice(config: RoutedAdapterConfig, sizes: Sizes) -> nn.Module:
    options = dict(config.select_options)
    threshold = options.pop("threshold", None)
    if threshold is None:
        return SelectExpertChoice(config.top_k, **options)
    if threshold != "ema":
        raise ConfigError(f"select_options['threshold'] is {threshold!r}, expected 'ema' or none.")
    return SelectEMAThreshold(sizes.slots, config.top_k, **options)


SELECTIONS: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], nn.Module]] = {
    "all": lambda config, sizes: SelectAll(**config.select_options),
    "top_k": _top_k,
    "sample_k": lambda config, sizes: SelectSampleK(config.top_k, **config.select_options),
    "top_p": lambda config, sizes: SelectTopP(**config.select_options),
    "positive": lambda config, sizes: SelectPositive(**config.select_options),
    "learned_threshold": lambda config, sizes: SelectLearnedThreshold(
        sizes.width_in, sizes.slots, **config.select_options
    ),
    "capacity": lambda config, sizes: SelectCapacity(config.top_k, **config.select_options),
    "expert_choice": _expert_choice,
}
WEIGHTS: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], Weight]] = {
    "softmax": lambda config, sizes: SoftmaxWeight(**config.weight_options),
    "selected_softmax": lambda config, sizes: SelectedSoftmaxWeight(**config.weight_options),
    "count_scaled_softmax": lambda config, sizes: CountScaledSoftmaxWeight(sizes.slots, **config.weight_options),
    "sigmoid": lambda config, sizes: SigmoidWeight(**config.weight_options),
    "relu": lambda config, sizes: ReLUWeight(**config.weight_options),
    "excess": lambda config, sizes: ExcessWeight(**config.weight_options),
    "relaxed_bernoulli": lambda config, sizes: RelaxedBernoulliWeight(groups=sizes.groups, **config.weight_options),
    "straight_through": lambda config, sizes: StraightThroughWeight(**config.weight_options),
    "dense_mixer": lambda config, sizes: DenseMixerWeight(**config.weight_options),
    "indicator": lambda config, sizes: ConstantWeight(1.0, **config.weight_options),
    "mean": lambda config, sizes: ConstantWeight(1.0 / sizes.num_experts, **config.weight_options),
    "constant": lambda config, sizes: ConstantWeight(**config.weight_options),
    "remix": lambda config, sizes: ConstantWeight(
        remix_weight(config.top_k, sizes.rank, config.use_rslora), **config.weight_options
    ),
    "raw": lambda config, sizes: RawWeight(**config.weight_options),
}
BANKS: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], Bank]] = {
    "lora": lambda config, sizes: _lora_bank(LoRABank, config, sizes),
    "shared_a": lambda config, sizes: _lora_bank(SharedABank, config, sizes),
    "rank_one": lambda config, sizes: RankOneBank(
        sizes.width_in,
        sizes.width_out,
        sizes.num_experts,
        scale=lora_scale(config, sizes, sizes.num_experts),
        **config.bank_options,
    ),
    "split_head": lambda config, sizes: SplitHeadBank(
        sizes.width_in,
        sizes.width_out,
        sizes.num_experts,
        sizes.rank,
        scale=lora_scale(config, sizes, sizes.rank),
        dropout=config.dropout,
        **config.bank_options,
    ),
}
STEPPERS: Mapping[str, Callable[[RoutedAdapterConfig, Sizes], StepState]] = {
    "loss_free": lambda config, sizes: LossFreeBias(sizes.slots, **config.stepper_options),
    "sparsity": lambda config, sizes: SparsityController(sizes.slots, config.top_k, **config.stepper_options),
    "two_stage_entropy": lambda config, sizes: TwoStageEntropy(**config.stepper_options),
}


def _lora_bank(kind: Callable[..., Bank], config: RoutedAdapterConfig, sizes: Sizes) -> Bank:
    """A bank of LoRA experts, whichever matrices they share."""
    return kind(
        sizes.width_in,
        sizes.width_out,
        sizes.num_experts,
        sizes.rank,
        scale=lora_scale(config, sizes, sizes.rank),
        dropout=config.dropout,
        **config.bank_options,
    )


def remix_weight(top_k: int, rank: int, use_rslora: bool) -> float:
    """ReMix's constant weight: 2/(k r), or its square-root form 2/sqrt(k r).

    Args:
        top_k: k.
        rank: r.
        use_rslora: the square-root form, which the paper's stronger results use.
    """
    return 2 / math.sqrt(top_k * rank) if use_rslora else 2 / (top_k * rank)


def lora_scale(config: RoutedAdapterConfig, sizes: Sizes, rank: int) -> float:
    """Multiplier of the mixture: `scale` if set, else alpha / r or alpha / sqrt(r)."""
    if config.scale is not None:
        return config.scale
    return sizes.alpha / (math.sqrt(rank) if config.use_rslora else rank)


def sizes_of(config: RoutedAdapterConfig, path: str, width_in: int, width_out: int) -> Sizes:
    """Sizes of the adapter of one linear.

    Args:
        config: the configuration.
        path: module path of the linear; the patterns are matched against it.
        width_in: D.
        width_out: O.
    """
    # PEFT's own rule, so that a pattern means here what it means for a LoRA
    experts = config.expert_pattern.get(get_pattern_key(config.expert_pattern, path), config.num_experts)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
    groups = config.bank_options.get("heads", 1) if config.bank == "split_head" else 1
    return Sizes(width_in, width_out, experts, rank, groups, alpha)


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
    losses = {name: (coefficient, _loss(config, name)) for name, coefficient in config.losses.items()}
    stepper = None if config.stepper is None else _build(STEPPERS, "stepper", config.stepper, config, sizes)
    return Router(
        sizes.slots,
        scope=_build(SCOPES, "scope", config.scope, config, sizes),
        score=_build(SCORES, "score", config.score, config, sizes),
        select=_build(SELECTIONS, "select", config.select, config, sizes),
        weight=_build(WEIGHTS, "weight", config.weight, config, sizes),
        losses=losses,
        detach_input=config.detach_router_input,
        stepper=stepper,
        freeze_after=config.router_freeze_after,
        frozen=config.freeze_router,
    )


def _loss(config: RoutedAdapterConfig, name: str) -> BalanceLoss:
    known = {**LOSSES, "relu_l1": ReLUSparsityLoss(config.top_k), "cv_typed": TypedCVLoss()}
    loss: Any = _named(known, "losses", name)
    for other in config.loss_options:
        if other not in config.losses:
            raise ConfigError(f"loss_options has {other!r}, which is not among the losses {sorted(config.losses)}.")
    if name not in config.loss_options:
        return loss
    try:
        return replace(loss, **config.loss_options[name])
    except TypeError as error:
        raise ConfigError(f"loss_options do not fit the loss {name!r}: {error}.{_nearest_option(error)}") from error


def _named(table: Mapping[str, T], field: str, name: str) -> T:
    if name not in table:
        raise ConfigError(f"{field} is {name!r}, which does not exist.{suggestion(name, list(table))}")
    return table[name]


def _build(table: Mapping[str, Builder], field: str, name: str, config: RoutedAdapterConfig, sizes: Sizes) -> Any:
    builder = _named(table, field, name)
    try:
        return builder(config, sizes)
    except TypeError as error:
        raise ConfigError(f"{field}_options do not fit {field} = {name!r}: {error}.{_nearest_option(error)}") from error


# arguments that a builder gives by itself
_GIVEN = {
    "self",
    "k",
    "width",
    "width_in",
    "width_out",
    "num_experts",
    "num_tasks",
    "rank",
    "skills",
    "scale",
    "dropout",
}


def _nearest_option(error: TypeError) -> str:
    """A sentence about the options there are, if the error is Python's about an argument that does not exist."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    part = None if match is None else globals().get(match[1])
    if match is None or part is None:
        return ""
    if dataclasses.is_dataclass(part):
        known = {field.name for field in dataclasses.fields(part)}
    else:
        known = set(inspect.signature(part.__init__).parameters) - {"args", "kwargs"}
    return suggestion(match[2], known - _GIVEN) if known - _GIVEN else " It has no options."
