"""The loop under every recipe of a layer router: AdamW, warm-up, schedule, clipping, and a place to stop and go on.

Source of the optimizer: decoupled weight decay, arXiv 1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moe_kit.errors import ConfigError, TrainingError


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of a training phase."""

    steps: int = 500
    """Optimizer steps, 1 or more."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, above 0."""

    schedule: str = "cosine"
    """`cosine` (to 0) or `constant`, after a linear warm-up."""

    warmup_steps: int = 0
    """Steps of the warm-up."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""

    gamma: float = 2.0
    """Exponent of the focal loss (supervised)."""

    beta: float = 0.999
    """Class balance of the focal loss (supervised); nearer to 1 re-balances more."""

    tau_start: float = 5.0
    """Gumbel temperature at the first step (end to end, Gumbel routers)."""

    tau_end: float = 1.0
    """Gumbel temperature at the last step."""

    samples: int = 4
    """M: sampled routes for each sequence (policy), 2 or more."""

    cost: float = 0.1
    """Price, in nats a token, of running every routable layer once (policy)."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, expected 1 or more.")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}, expected a number above 0.")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"schedule is {self.schedule!r}, expected 'cosine' or 'constant'.")
        if self.samples < 2:
            raise ConfigError(f"samples is {self.samples}, expected 2 or more for a leave-one-out estimate.")


class Keeper(Protocol):
    """Keeps what a phase needs to go on after an interruption; `moe_kit.training.depth_progress` has one on disk."""

    def begin(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """Put the optimizer and the random state where the phase stopped; returns the figures of the steps done."""

    def after(self, optimizer: torch.optim.Optimizer, history: Sequence[float]) -> None:
        """A step is done; `history` holds its figure and those before. Leaves by an exception to stop here."""


def fit(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    losses: Iterator[Callable[[], Tensor]],
    config: FitConfig,
    on_step: Callable[[int, float], None] | None = None,
    *,
    figure: Callable[[], float] | None = None,
    keeper: Keeper | None = None,
) -> list[float]:
    """The loop under every recipe.

    Args:
        model: put into training mode for the duration.
        parameters: what learns; everything else is left as it is.
        losses: yields, for each step, a function that computes its loss. Steps that were done before an interruption
            are drawn and not computed, so the order of the data must not depend on what was computed.
        config: settings.
        on_step: called with the step and its figure.
        figure: what to report of a step instead of its loss.
        keeper: remembers every step, so that an interrupted phase ends as if it had not been.

    Returns:
        Figure of every step.

    Raises:
        ConfigError: if there is nothing to train, or the batches end before the steps.
        TrainingError: if a loss is not finite; the parameters are then those before the step.
    """
    if not parameters:
        raise ConfigError("nothing to train: the active adapter has no such parameters (static and random have none).")
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    history = [] if keeper is None else keeper.begin(optimizer)
    first, was_training = len(history), model.training
    model.train()
    try:
        for step in range(config.steps):
            compute = next(losses, None)
            if compute is None:
                raise ConfigError(f"the batches ended after {step} of {config.steps} steps: give more, or fewer steps.")
            if step < first:
                continue
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _rate(step, config)
            loss = compute()
            if not bool(loss.isfinite()):
                raise TrainingError(
                    f"the loss is {float(loss)} at step {step} of {config.steps}: lower the learning rate, or look at the "
                    "examples of this step."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            history.append(float(loss.detach()) if figure is None else figure())
            if on_step is not None:
                on_step(step, history[-1])
            if keeper is not None:
                keeper.after(optimizer, history)
    finally:
        model.train(was_training)
    return history


def _rate(step: int, config: FitConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
