"""Scores: what each expert is worth to a decision, as float32 logits.

Shapes: N decisions, D model width, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from moe_kit_kernels.common.backward import first_order
from torch import Tensor, nn

from moe_kit.errors import ConfigError, RoutingError
from moe_kit.routing.frozen import HoldsFrozen
from moe_kit.routing.scope import Decisions


class LinearScore(nn.Module):
    """`logits = x W^T`, computed in float32 whatever the model's dtype.

    Args:
        width: D.
        num_experts: E.
        init_std: standard deviation of the normal initialisation; 0 starts from equal scores.
        bias: adds a bias [E].
        jitter: in training, multiply the input by noise uniform in [1 - jitter, 1 + jitter] (Switch: 0.01).

    Source: the token-choice gate of Switch, arXiv 2101.03961; ReMix uses the same matrix, arXiv 2603.10160.
    """

    def __init__(
        self, width: int, num_experts: int, *, init_std: float = 0.02, bias: bool = False, jitter: float = 0.0
    ) -> None:
        super().__init__()
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        nn.init.normal_(self.weight, std=init_std) if init_std else nn.init.zeros_(self.weight)

    def forward(self, decisions: Decisions) -> Tensor:
        """Logits, float32 [N, E]."""
        device = decisions.x_ND.device.type
        if not torch.is_autocast_enabled(device):
            return self._logits(decisions.x_ND)
        # autocast would run this in half precision
        with torch.autocast(device, enabled=False):
            return self._logits(decisions.x_ND)

    def _logits(self, x_ND: Tensor) -> Tensor:
        x_ND, weight_ED = x_ND.float(), self.weight.float()
        if self.jitter and self.training:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.jitter, 1 + self.jitter)
        if self.bias is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _NarrowLinear.apply(x_ND, weight_ED)
        return F.linear(x_ND, weight_ED, None if self.bias is None else self.bias.float())


def is_plain_linear(score: nn.Module) -> bool:
    """Whether logits are `x W^T` and nothing else.

    Args:
        score: a score.
    """
    return type(score) is LinearScore and score.bias is None and not score.jitter


class _NarrowLinear(torch.autograd.Function):
    """`x W^T` for a weight of few rows: autograd's own weight gradient is `(x^T g)^T`, several times slower than `g^T x`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        return x_ND @ weight_ED.t()

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient_NE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ND, weight_ED = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            gradient_NE @ weight_ED if needs_x else None,
            gradient_NE.t() @ x_ND if needs_weight else None,
        )


@dataclass(frozen=True)
class NoisyLogits:
    """Logits with the noise of this pass, and what the noise is about.

    Attributes:
        values_NE: float32 [N, E], noisy; choice and weights are made from these.
        clean_NE: float32 [N, E], without the noise.
        std_NE: float32 [N, E], standard deviation of the noise.
    """

    values_NE: Tensor
    clean_NE: Tensor
    std_NE: Tensor

    def chosen_probability(self, k: int) -> Tensor:
        """Probability that each expert is among the k best if its own noise is drawn again.

        Phi((clean_e - k-th best of the others) / std_e), differentiable: the smooth load.

        Args:
            k: experts chosen.

        Returns:
            float32 [N, E].
        """
        experts = self.values_NE.shape[-1]
        if k >= experts:
            return torch.ones_like(self.values_NE)
        best = self.values_NE.sort(dim=-1, descending=True, stable=True).values
        kth, next_one = best[:, k - 1 : k], best[:, k : k + 1]
        # without an expert that is among the k best, the k-th of the rest is the (k+1)-th of all
        others = torch.where(self.values_NE >= kth, next_one, kth)
        return torch.special.ndtr((self.clean_NE - others) / self.std_NE)


class NoisyLinearScore(nn.Module):
    """`x W^T + noise softplus(x V^T)` in training, `x W^T` in evaluation; both matrices start at 0.

    Args:
        width: D.
        num_experts: E.
        min_std: least standard deviation of the noise.

    Source: noisy top-k gating, arXiv 1701.06538.
    """

    def __init__(self, width: int, num_experts: int, *, min_std: float = 1e-2) -> None:
        super().__init__()
        self.min_std = min_std
        self.weight = nn.Parameter(torch.zeros(num_experts, width))
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, decisions: Decisions) -> Tensor | NoisyLogits:
        """Logits, float32 [N, E], with their noise in training."""
        with torch.autocast(decisions.x_ND.device.type, enabled=False):
            x_ND = decisions.x_ND.float()
            clean = F.linear(x_ND, self.weight.float())
            if not self.training:
                return clean
            std = F.softplus(F.linear(x_ND, self.noise_weight.float())) + self.min_std
            return NoisyLogits(clean + torch.randn_like(clean) * std, clean, std)


class PrototypeScore(HoldsFrozen):
    """Likeness of the input to one prototype an expert.

    Args:
        width: D.
        num_experts: E.
        metric: "dot" (x.p), "layer_norm" (LN(x).LN(p) / sqrt D, no affine), "cosine", or "absolute" (|x.p|).
        temperature: divides the likeness.
        prototypes_ED: start values; None draws them normal with standard deviation 1/sqrt(D).
        trainable: False keeps them as they are.

    Source: LayerNorm form: PHATGOOSE as used by GLIDER, arXiv 2410.07172; absolute form: Arrow, arXiv 2405.11157.
    """

    METRICS = ("dot", "layer_norm", "cosine", "absolute")
    prototypes: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        metric: str = "cosine",
        temperature: float = 1.0,
        prototypes_ED: Tensor | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if metric not in self.METRICS:
            raise ConfigError(f"metric is {metric!r}, expected one of {', '.join(self.METRICS)}.")
        self.metric, self.temperature = metric, temperature
        values = torch.randn(num_experts, width) / math.sqrt(width) if prototypes_ED is None else prototypes_ED.clone()
        if trainable:
            self.prototypes = nn.Parameter(values)
        else:
            self.hold_frozen("prototypes", values)

    def forward(self, decisions: Decisions) -> Tensor:
        """Logits, float32 [N, E]."""
        with torch.autocast(decisions.x_ND.device.type, enabled=False):
            x_ND, p_ED = decisions.x_ND.float(), self.prototypes.float()
            if self.metric == "cosine":
                likeness = F.normalize(x_ND, dim=-1) @ F.normalize(p_ED, dim=-1).T
            elif self.metric == "layer_norm":
                width = x_ND.shape[-1:]
                likeness = F.layer_norm(x_ND, width) @ F.layer_norm(p_ED, width).T / math.sqrt(width[0])
            else:
                likeness = x_ND @ p_ED.T
            return (likeness.abs() if self.metric == "absolute" else likeness) / self.temperature


class FrozenSparseScore(HoldsFrozen):
    """`logits = A x` with a frozen random A of p non-zeros a row: projection and router in one.

    The rows of A are the experts' own down projections, so no router is trained.

    Args:
        width: D.
        num_experts: E, the rank of the whole adapter.
        density: share of non-zeros in a row; FlyLoRA uses k / E.
        seed: of A; None draws from torch's default generator. Adapters that are to be merged by factors share a seed,
            those merged by weight differences want different ones.
        dropout: probability of dropping an element of x in training, in [0, 1): a LoRA's dropout, which stands before A.
            What the experts add and which of them are chosen then come from the same dropped x.

    Attributes:
        A: float32 frozen parameter [E, D], entries N(0, 1/E^2).

    Source: FlyLoRA, arXiv 2510.08396.
    """

    A: Tensor

    def __init__(
        self, width: int, num_experts: int, *, density: float = 0.25, seed: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise ConfigError(f"density is {density}, expected a value in (0, 1].")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        filled = max(1, round(density * width))
        places = torch.rand(num_experts, width, generator=generator).argsort(-1)[:, :filled]
        values = torch.randn(num_experts, filled, generator=generator) / num_experts
        self.hold_frozen("A", torch.zeros(num_experts, width).scatter(1, places, values))
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, decisions: Decisions) -> Tensor:
        """A x, float32 [N, E]."""
        with torch.autocast(decisions.x_ND.device.type, enabled=False):
            x_ND = decisions.x_ND.float()
            return F.linear(x_ND if self.dropout is None else self.dropout(x_ND), self.A.detach().float())


class UniformScore(nn.Module):
    """Equal logits for all experts, whatever the input: routing is constant.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, decisions: Decisions) -> Tensor:
        """Zeros, float32 [N, E]."""
        return decisions.x_ND.new_zeros(decisions.x_ND.shape[0], self.num_experts, dtype=torch.float32)

    def constant_logits(self, task_id: int | None) -> Tensor:
        """Zeros [1, E]."""
        return torch.zeros(1, self.num_experts)


class MLPScore(nn.Module):
    """Two linear layers with a non-linearity between them.

    Args:
        width: D.
        num_experts: E.
        hidden: width of the hidden layer.
        activation: "gelu", "silu", "relu" or "tanh".

    Raises:
        ConfigError: if the activation is none of these, or the hidden layer has no unit.

    Source: routers of this form in TeamLoRA, arXiv 2408.09856, and X-LoRA, arXiv 2402.07148.
    """

    _ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "tanh": torch.tanh}

    def __init__(self, width: int, num_experts: int, *, hidden: int = 64, activation: str = "gelu") -> None:
        super().__init__()
        if activation not in self._ACTIVATIONS:
            raise ConfigError(f"activation is {activation!r}, expected one of {', '.join(self._ACTIVATIONS)}.")
        if hidden < 1:
            raise ConfigError(f"the hidden layer has {hidden} units, expected 1 or more.")
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, num_experts)
        self.activation = activation
        nn.init.normal_(self.up.weight, std=0.02)
        nn.init.zeros_(self.up.bias)

    def forward(self, decisions: Decisions) -> Tensor:
        """Logits, float32 [N, E]."""
        with torch.autocast(decisions.x_ND.device.type, enabled=False):
            hidden = F.linear(decisions.x_ND.float(), self.down.weight.float(), self.down.bias.float())
            hidden = self._ACTIVATIONS[self.activation](hidden)
            return F.linear(hidden, self.up.weight.float(), self.up.bias.float())


class TaskTableScore(nn.Module):
    """One learned row of logits for each task.

    Args:
        num_tasks: rows of the table.
        num_experts: E (heads times skills for a split bank).
        init_range: entries start uniform in [-init_range, init_range].

    Source: Poly, arXiv 2202.13914; MHR, arXiv 2211.03831.
    """

    def __init__(self, num_tasks: int, num_experts: int, *, init_range: float = 1e-3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, num_experts).uniform_(-init_range, init_range))

    def forward(self, decisions: Decisions) -> Tensor:
        """Logits, float32 [N, E]."""
        return self.weight.float()[decisions.task_ids_N]

    def constant_logits(self, task_id: int | None) -> Tensor | None:
        """The row of a task [1, E]; the only row if there is one task; None if no task is named.

        Args:
            task_id: task, or None.
        """
        if task_id is None:
            return self.weight.float() if self.weight.shape[0] == 1 else None
        if not 0 <= task_id < self.weight.shape[0]:
            raise RoutingError(f"task id {task_id} is out of range, expected 0 to {self.weight.shape[0] - 1}.")
        return self.weight.float()[task_id : task_id + 1]
