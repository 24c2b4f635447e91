r"""Schedules of a router's training: two entropy stages, and freezing.

Two stages ("MAGNET-style": the published abstract gives neither formula nor threshold, this form is our own). With
Hs the mean normalised entropy of single decisions and Hc that of the mean decision,

    stage 1   L = L_task - b_c Hc - b_e Hs           explore: raise both
    stage 2   L = L_task - b_c Hc + b_s ramp Hs      specialise: keep coverage, peak the decisions

The switch is a one-way latch: it falls when a moving average of Hs has stayed at or above a threshold for a number of
steps in a row, or at a cap. The ramp grows from 0, so the loss has no jump.

Freezing: after a number of steps the router's parameters, balance biases and thresholds stay bit-constant while the
experts train on (theory of mixtures in continual learning, arXiv 2406.16437, shows that routers must stop). Values are
restored after each optimizer step, which works with every optimizer, weight decay and DDP, where switching
`requires_grad` does not, and needs no wait for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_kit.errors import ConfigError, RoutingError
from moe_kit.routing.decision import Routing
from moe_kit.routing.frozen import assign, is_partitioned, whole
from moe_kit.routing.step import StepState


class TwoStageEntropy(StepState):
    """Factors of the entropy losses, moved by the entropy that the routers show.

    Use with `losses={"maximise_mean_entropy": b_c, "maximise_token_entropy": b_e, "minimise_token_entropy": b_s}`.

    Args:
        threshold: of the moving average of Hs, in [0, 1].
        patience: steps in a row at or above the threshold.
        max_steps: cap of stage 1; None = no cap.
        decay: of the moving average.
        ramp_steps: steps over which stage 2 comes in and stage 1's push on Hs goes out.

    Attributes:
        steps, average, streak, switched_at: float32 frozen parameters [1], so that a resumed run keeps its stage;
            `switched_at` is -1 in stage 1.
    """

    pooled = True
    steps: Tensor
    average: Tensor
    streak: Tensor
    switched_at: Tensor

    def __init__(
        self,
        *,
        threshold: float = 0.9,
        patience: int = 20,
        max_steps: int | None = None,
        decay: float = 0.9,
        ramp_steps: int = 100,
    ) -> None:
        if not 0 <= threshold <= 1 or patience < 1 or ramp_steps < 1 or not 0 <= decay < 1:
            raise ConfigError(
                f"threshold {threshold}, patience {patience}, ramp_steps {ramp_steps}, decay {decay}: expected [0, 1], "
                "1 or more, 1 or more, [0, 1)."
            )
        super().__init__(2)
        self.threshold, self.patience, self.max_steps = threshold, patience, max_steps
        self.decay, self.ramp_steps = decay, ramp_steps
        for name in ("steps", "average", "streak"):
            self.hold_frozen(name, torch.zeros(()))
        self.hold_frozen("switched_at", torch.tensor(-1.0))

    def pool_key(self) -> tuple:
        """Schedules with equal settings move as one."""
        return (*super().pool_key(), self.threshold, self.patience, self.max_steps, self.decay, self.ramp_steps)

    @property
    def ramp(self) -> Tensor:
        """How far stage 2 has come in, [] in [0, 1]; 0 in stage 1."""
        switched_at = whole(self.switched_at)[0]
        since = (whole(self.steps)[0] - switched_at).clamp(0, self.ramp_steps) / self.ramp_steps
        return torch.where(switched_at < 0, 0.0, since)

    def loss_factor(self, name: str) -> Tensor | float:
        """1 - ramp for the push up on Hs, ramp for the push down, 1 for all else."""
        if name == "maximise_token_entropy":
            return 1 - self.ramp
        return self.ramp if name == "minimise_token_entropy" else 1.0

    def measure(self, routing: Routing) -> Tensor:
        """Sum of normalised entropies of real decisions, and their number."""
        if routing.logits_NE is None:
            return self.steps.new_zeros(2)
        log_p = routing.logits_NE.log_softmax(-1)
        entropy_N = -(log_p.exp() * log_p).sum(-1) / math.log(max(log_p.shape[-1], 2))
        if routing.mask_N is None:
            return torch.stack([entropy_N.sum(), entropy_N.new_tensor(float(entropy_N.shape[0]))])
        return torch.stack([torch.where(routing.mask_N, entropy_N, 0.0).sum(), routing.mask_N.sum().to(entropy_N)])

    def update(self, total: Tensor) -> None:
        """Move the average, the streak and the latch."""
        steps, average, streak = whole(self.steps), whole(self.average), whole(self.streak)
        switched_at = whole(self.switched_at)
        mean = (total[0] / total[1].clamp_min(1)).to(average)
        average = torch.where(steps == 0, mean, self.decay * average + (1 - self.decay) * mean)
        steps = steps + 1
        streak = torch.where(average >= self.threshold, streak + 1, 0.0)
        falls = streak >= self.patience
        if self.max_steps is not None:
            falls = falls | (steps >= self.max_steps)
        switched_at = torch.where((switched_at < 0) & falls, steps, switched_at)
        for name, value in {"steps": steps, "average": average, "streak": streak, "switched_at": switched_at}.items():
            assign(getattr(self, name), value)


class FreezeSchedule(StepState):
    """Keeps some modules as they are after a number of optimizer steps: parameters, and what moves once a step.

    Args:
        after: steps that still train them; 0 never moves them.
        parts: modules that freeze; not registered here, since they have an owner. Step states among them must be updated
            before this one.

    Attributes:
        steps: float32 frozen parameter [1], steps that trained the parts; the frozen values themselves are the saved
            parameters.
    """

    steps: Tensor

    def __init__(self, after: int, parts: list[nn.Module]) -> None:
        if after < 0:
            raise ConfigError(f"a router cannot freeze after {after} steps, expected 0 or more.")
        super().__init__(1)
        self.after = after
        self.parts = parts
        self.kept: list[Tensor] | None = None
        self.hold_frozen("steps", torch.zeros(()))

    def moves(self) -> list[Tensor]:
        """Its own step and what it puts back."""
        return [self.steps, *self._held()]

    def _held(self) -> list[Tensor]:
        return [value for part in self.parts for value in part.parameters()]

    def measure(self, routing: Routing) -> Tensor:
        """One, and a copy of the values before the first step."""
        if self.kept is None:
            self.kept = [whole(value).clone() for value in self._held()]
        return self.steps.new_ones(1)

    def update(self, total: Tensor) -> None:
        """Follow the values until frozen, put them back afterwards; no wait for the device.

        Raises:
            RoutingError: if the values live in an optimizer of ZeRO, where putting them back would change nothing.
        """
        if self.kept is None:
            # this router has not run yet: other sites have
            return
        if any(value.requires_grad and is_partitioned(value) for value in self._held()):
            raise RoutingError(
                "router_freeze_after puts a router back after each step, but DeepSpeed's ZeRO keeps its weights in the "
                "optimizer: train in two runs, the second with freeze_router=True, or use FSDP2 or DDP."
            )
        steps = whole(self.steps)
        frozen = steps >= self.after
        assign(self.steps, torch.where(frozen, steps, steps + 1))
        for kept, value in zip(self.kept, self._held(), strict=True):
            kept.copy_(torch.where(frozen, kept, whole(value)))
            assign(value, kept)
