"""Scores: what each expert is worth to a decision, as float32 logits.

Shapes: N decisions, D model width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kit.routing.scope import Decisions


class LinearScore(nn.Module):
    """`logits = x W^T`, computed in float32 whatever the model's dtype.

    Args:
        width: D.
        num_experts: E.
        init_std: standard deviation of the normal initialisation; 0 starts from equal scores.
        bias: adds a bias [E].

    Source: the token-choice gate of Switch, arXiv 2101.03961; ReMix uses the same matrix, arXiv 2603.10160.
    """

    def __init__(self, width: int, num_experts: int, *, init_std: float = 0.02, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        nn.init.normal_(self.weight, std=init_std) if init_std else nn.init.zeros_(self.weight)

    def forward(self, decisions: Decisions) -> Tensor:
        """Logits, float32 [N, E]."""
        bias = None if self.bias is None else self.bias.float()
        # autocast would run this in half precision
        with torch.autocast(decisions.x_ND.device.type, enabled=False):
            return F.linear(decisions.x_ND.float(), self.weight.float(), bias)


class MLPScore(nn.Module):
    """Two linear layers with a non-linearity between them.

    Args:
        width: D.
        num_experts: E.
        hidden: width of the hidden layer.
        activation: "gelu", "silu", "relu" or "tanh".
    """

    _ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "tanh": torch.tanh}

    def __init__(self, width: int, num_experts: int, *, hidden: int = 64, activation: str = "gelu") -> None:
        super().__init__()
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
