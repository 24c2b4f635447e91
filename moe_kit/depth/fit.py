r"""Training recipes of layer routers: plain loops over batches, one for each way to learn.

    supervised    focal loss against searched routes, the forward pass runs the searched route       Dr.LLM
    end_to_end    the model's loss, to which the hooks add the routing losses; tau falls             FiRST, FlexiDepth, MoD,
                                                                                                     Informed stage 2
    forecasters   SmoothL1(G_u(x), F_u(x)) summed over units, dense hidden states                    Informed stage 1
    policy        leave-one-out policy gradient over sampled routes, reward = -loss - cost          ours
    others        routers frozen and hard, other adapters (LoRA) learn                               FiRST, Informed stage 3

A batch is a dict of `input_ids`, `attention_mask` and `labels`, as any language-model collator gives. Which tokens a
decision may read follows from the labels.

Shapes: B rows, M Monte Carlo samples, U units, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_kit.depth.loop import FitConfig, Keeper, fit
from moe_kit.depth.losses import Trace, class_weights, focal_loss
from moe_kit.depth.measure import forecast_losses, sum_losses
from moe_kit.depth.state import DepthState, find_depth_state
from moe_kit.depth.steer import force_layers
from moe_kit.errors import ConfigError
from moe_kit.routing.frozen import frozen_parameters
from moe_kit.routing.policy import rloo_loss

__all__ = [
    "FitConfig",
    "fit",
    "fit_end_to_end",
    "fit_forecasters",
    "fit_others",
    "fit_policy",
    "fit_supervised",
]

Batch = dict[str, Tensor]


def _learn_only(model: nn.Module, wanted: Callable[[str], bool]) -> list[nn.Parameter]:
    """Give a gradient to the named parameters and to no others; frozen ones stay frozen."""
    frozen = set(map(id, frozen_parameters(model)))
    chosen = []
    for name, parameter in model.named_parameters():
        learns = wanted(name) and id(parameter) not in frozen
        parameter.requires_grad_(learns)
        if learns:
            chosen.append(parameter)
    return chosen


def _part(state: DepthState, container: str) -> Callable[[str], bool]:
    adapter = state.active()
    return lambda name: f".{container}.{adapter}." in name


def fit_supervised(
    model: nn.Module,
    examples: Iterable[tuple[Batch, Tensor]],
    config: FitConfig,
    *,
    class_counts: Sequence[float] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    keeper: Keeper | None = None,
) -> list[float]:
    """Train routers on searched routes; layer l sees the states of the searched route, not of its own mistakes.

    Args:
        model: a model with learned per-sequence layer routers.
        examples: (batch, actions int [B, L]) for each step; the batch needs no labels but a prompt to read.
        config: settings.
        class_counts: labels of skip, execute, repeat in all data, for the balance; None = no balance.
        on_step: called with the step and its loss.
        keeper: see `fit`.

    Returns:
        Focal loss of every step.
    """
    state = find_depth_state(model)
    parameters = _learn_only(model, _part(state, "moe_depth_router"))
    codes = state.configs[state.active()].action_codes
    alpha_A = None
    if class_counts is not None:
        alpha_A = class_weights(torch.tensor([float(class_counts[code]) for code in codes]), config.beta)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for batch, actions in examples:
            yield lambda batch=batch, actions=actions: _supervised_loss(model, state, batch, actions, alpha_A, config)

    return fit(model, parameters, losses(), config, on_step, keeper=keeper)


def _supervised_loss(
    model: nn.Module, state: DepthState, batch: Batch, actions: Tensor, alpha_A: Tensor | None, config: FitConfig
) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with force_layers(model, actions):
        # the head is not needed: one position is the cheapest that every model accepts
        model(**inputs, use_cache=False, logits_to_keep=1)
    codes = state.configs[state.active()].action_codes
    logits, labels = [], []
    for trace in state.present.traces:
        column = actions[:, trace.column].to(trace.logits_NA.device)
        index = torch.full_like(column, -100)
        for position, code in enumerate(codes):
            index = torch.where(column == code, position, index)
        logits.append(trace.logits_NA)
        labels.append(index)
    return focal_loss(torch.cat(logits), torch.cat(labels), alpha_A, config.gamma)


def fit_end_to_end(
    model: nn.Module,
    batches: Iterable[Batch],
    config: FitConfig,
    *,
    on_step: Callable[[int, float], None] | None = None,
    keeper: Keeper | None = None,
) -> list[float]:
    """Train routers, and the stand-ins of gated presets, by the language-model loss plus the routing losses.

    Args:
        model: a model with learned layer routers.
        batches: with labels.
        config: settings; Gumbel routers cool from `tau_start` to `tau_end`.
        on_step: called with the step and its loss.
        keeper: see `fit`.

    Returns:
        Loss of every step, routing losses included.
    """
    state = find_depth_state(model)
    settings = state.configs[state.active()]
    routers, stand_ins = _part(state, "moe_depth_router"), _part(state, "moe_depth_forecaster")
    # a forecaster that was fitted first stays what it is; a gate's adapter learns with the gate
    together = settings.train_mode != "gumbel"
    parameters = _learn_only(model, lambda name: routers(name) or (together and stand_ins(name)))

    def losses() -> Iterator[Callable[[], Tensor]]:
        for step, batch in enumerate(batches):
            done = step / max(1, config.steps - 1)
            settings.tau = config.tau_start + (config.tau_end - config.tau_start) * min(1.0, done)
            yield lambda batch=batch: model(**batch, use_cache=False).loss

    return fit(model, parameters, losses(), config, on_step, keeper=keeper)


def fit_forecasters(
    model: nn.Module,
    batches: Iterable[Batch],
    config: FitConfig,
    *,
    on_step: Callable[[int, float], None] | None = None,
    keeper: Keeper | None = None,
) -> list[float]:
    """Fit every forecaster to the increment of its unit on dense hidden states.

    Args:
        model: a model whose active layer routers have forecasters.
        batches: labels are not read.
        config: settings.
        on_step: called with the step and its loss.
        keeper: see `fit`.

    Returns:
        Loss of every step: SmoothL1 over real tokens, summed over units.
    """
    state = find_depth_state(model)
    parameters = _learn_only(model, _part(state, "moe_depth_forecaster"))

    def losses() -> Iterator[Callable[[], Tensor]]:
        for batch in batches:
            yield lambda batch=batch: sum_losses(forecast_losses(model, batch))

    return fit(model, parameters, losses(), config, on_step, keeper=keeper)


def fit_policy(
    model: nn.Module,
    batches: Iterable[Batch],
    config: FitConfig,
    *,
    on_step: Callable[[int, float], None] | None = None,
    keeper: Keeper | None = None,
) -> list[float]:
    r"""Train per-sequence routers by reward: M routes are sampled for each sequence,

        reward = -(mean loss of its answer's tokens) - cost * (layers applied) / (routable layers),

    and the leave-one-out estimator pushes up the log-probability of those that beat their siblings.

    Args:
        model: a model with per-sequence routers and `train_mode="sample"`.
        batches: with labels.
        config: settings; `samples` and `cost`.
        on_step: called with the step and its mean negative reward.
        keeper: see `fit`.

    Returns:
        Mean negative reward of every step.

    Raises:
        ConfigError: if the routers do not sample.
    """
    state = find_depth_state(model)
    adapter = state.active()
    if state.configs[adapter].train_mode != "sample":
        raise ConfigError(
            f"fit_policy needs train_mode='sample', got {state.configs[adapter].train_mode!r}: set it in the config."
        )
    parameters = _learn_only(model, _part(state, "moe_depth_router"))
    values: list[float] = []

    def losses() -> Iterator[Callable[[], Tensor]]:
        for batch in batches:
            yield lambda batch=batch: _policy_loss(model, state, batch, config, values)

    return fit(model, parameters, losses(), config, on_step, figure=lambda: values[-1], keeper=keeper)


def _policy_loss(model: nn.Module, state: DepthState, batch: Batch, config: FitConfig, values: list[float]) -> Tensor:
    rows = batch["input_ids"].shape[0]
    many = {name: value.repeat(config.samples, *[1] * (value.dim() - 1)) for name, value in batch.items()}
    labels = many.pop("labels")
    prompt = {"labels": labels}
    out = model(**many, **prompt, use_cache=False)
    traces: list[Trace] = state.present.traces
    with torch.no_grad():
        loss_BS = functional.cross_entropy(
            out.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        )
        loss_MB = (loss_BS.sum(1) / (labels[:, 1:] != -100).sum(1).clamp_min(1)).view(config.samples, rows)
        adapter = state.active()
        columns = sorted(state.units[adapter])
        table = state.decided(adapter)[:, columns]
        applied_MB = (table % 3).float().mean(1).view(config.samples, rows).to(loss_MB.device)
        penalty_MB = loss_MB + config.cost * applied_MB
    log_prob_MB = torch.stack([trace.log_prob_N for trace in traces]).sum(0).view(config.samples, rows)
    values.append(float(penalty_MB.mean()))
    return rloo_loss(penalty_MB, log_prob_MB) / rows


def fit_others(
    model: nn.Module,
    batches: Iterable[Batch],
    config: FitConfig,
    *,
    adapters: Sequence[str],
    on_step: Callable[[int, float], None] | None = None,
    keeper: Keeper | None = None,
) -> list[float]:
    """Train other adapters, such as LoRA, under frozen routers that decide hard: FiRST's second phase.

    Args:
        model: a native model with several adapters, all of them active.
        batches: with labels.
        config: settings.
        adapters: names of the adapters that learn.
        on_step: called with the step and its loss.
        keeper: see `fit`.

    Returns:
        Language-model loss of every step.
    """

    def wanted(name: str) -> bool:
        return any(f".{adapter}." in name or name.endswith(f".{adapter}") for adapter in adapters)

    parameters = _learn_only(model, wanted)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for batch in batches:
            yield lambda batch=batch: model(**batch, use_cache=False).loss

    return fit(model, parameters, losses(), config, on_step, keeper=keeper)
