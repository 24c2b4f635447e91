"""Balance of two types of experts over two types of data: each type of data leans to experts of its own.

Shapes: G sites, N decisions, B sequences, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kit.errors import ConfigError, RoutingError
from moe_kit.routing.balance import RoutingStack


@dataclass(frozen=True)
class TypedCVLoss:
    r"""CV² of importance where experts and data fall into two types, each type of data leaning to its own experts.

        Z_be = I_be * mean over the real tokens of sequence b of w_be,   loss = var(Z) / mean(Z)^2 over all b and e
        I_be = 1 - delta if expert e is of the type of sequence b, else 1 + delta

    At the minimum Z is even, so a sequence gives each expert of its own type (1 + delta) / (1 - delta) times the weight
    of one of the other type, and experts of one type are balanced among each other. With delta = 0 it keeps the experts
    of each sequence even, whatever the types.

    Attributes:
        delta: how far the types part, in [0, 1).
        expert_types: 0 or 1 for each expert; None = the first half (rounded up) is 0, the rest 1.

    Which types are called the same is a matter of naming: the authors' code multiplies the first half by 1 + delta for
    tasks of type 1, which is this loss with the first half named 0. It sums over tokens where this takes the mean, so
    that a long sequence does not weigh more.

    Source: LoRAMoE, arXiv 2312.09979, "localized balancing constraint".
    """

    delta: float = 0.1
    expert_types: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 1:
            raise ConfigError(f"delta of the loss 'cv_typed' is {self.delta!r}, expected a number in [0, 1).")
        if self.expert_types is not None:
            object.__setattr__(self, "expert_types", tuple(self.expert_types))
            if set(self.expert_types) - {0, 1}:
                raise ConfigError(f"expert_types of the loss 'cv_typed' is {self.expert_types}, expected 0 and 1 only.")

    def __call__(self, stack: RoutingStack) -> Tensor:
        """float32 [G], 0 when balanced within the types; needs `routing_inputs(model, task_types=...)`."""
        weights_GNE, real_N = stack.weights_GNE, stack.real_N
        experts = weights_GNE.shape[-1]
        count = weights_GNE.shape[1] if stack.num_sequences is None else stack.num_sequences
        emphasis_BE = self._emphasis(stack.task_types, count, experts, weights_GNE.device)
        kept_GNE = torch.where(real_N[:, None] > 0, weights_GNE, 0.0)
        tokens_B = real_N
        if stack.sequence_N is not None:
            kept_GNE = kept_GNE.new_zeros(kept_GNE.shape[0], count, experts).index_add(1, stack.sequence_N, kept_GNE)
            tokens_B = real_N.new_zeros(count).index_add(0, stack.sequence_N, real_N)
        importance_GBE = kept_GNE / tokens_B.clamp_min(1.0)[:, None] * emphasis_BE
        real_B1 = (tokens_B > 0).float()[:, None]
        entries = stack.total(real_B1.sum()).clamp_min(1.0) * experts
        mean_G = stack.total((importance_GBE * real_B1).sum((1, 2))) / entries
        # the variance about a constant near the mean: exact in value and gradient, without cancellation
        apart_GBE = (importance_GBE - mean_G.detach()[:, None, None]) * real_B1
        shift_G = stack.total(apart_GBE.sum((1, 2))) / entries
        variance_G = stack.total(apart_GBE.square().sum((1, 2))) / entries - shift_G.square()
        return variance_G / (mean_G.square() + 1e-10)

    def _emphasis(self, task_types: Any, count: int, experts: int, device: torch.device) -> Tensor:
        """I_be, float32 [B, E]."""
        if task_types is None:
            raise RoutingError(
                "the loss 'cv_typed' needs the type of each row's data, 0 or 1: wrap the training step in "
                "`with routing_inputs(model, task_types=...)`, one value for each row or one for all."
            )
        types_B = torch.as_tensor(task_types, device=device).reshape(-1)
        if types_B.shape[0] not in (1, count):
            raise RoutingError(
                f"task_types has {types_B.shape[0]} values but the batch {count} sequences: give one for each row (packed "
                "rows hold several sequences and cannot be told apart), or one for all."
            )
        if types_B.device.type == "cpu" and bool(((types_B != 0) & (types_B != 1)).any()):
            raise RoutingError(f"task_types is {types_B.tolist()}, expected 0 and 1 only.")
        own = self.expert_types or tuple(int(e >= (experts + 1) // 2) for e in range(experts))
        if len(own) != experts:
            raise RoutingError(f"expert_types names {len(own)} experts, the router has {experts}: give one for each.")
        same_BE = types_B.expand(count)[:, None] == torch.tensor(own, device=device)
        return torch.where(same_BE, 1.0 - self.delta, 1.0 + self.delta)
