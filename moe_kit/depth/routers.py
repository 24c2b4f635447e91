r"""Routers of layer routing: from hidden states to one logit an action, and from logits to an action.

Dr.LLM (arXiv 2510.12773, section 3.1): z = mean of the router's logits over windows of the prompt (`windows`).

FiRST (arXiv 2410.12513, reconstruction): rho = mean over prompt tokens of sigmoid(w . h_t); execute iff rho >= 1/2.

Weights are bare parameters and no `nn.Linear`, so that no other PEFT method targets them; they stay float32.

Shapes: B rows, S sequence, D width, A actions, F hidden width, N decisions (rows or tokens).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_kit.depth.config import EXECUTE, REPEAT, SKIP, LayerRoutingConfig
from moe_kit.depth.windows import Windows
from moe_kit.routing.frozen import HoldsFrozen

# bias of execute over the other actions in a fresh router; softmax gives it 0.98 of three
EXECUTE_BIAS = 5.0


class Affine(nn.Module):
    """An affine map with bare parameters.

    Args:
        width_in: D.
        width_out: outputs.
        bias: whether it has one.
    """

    def __init__(self, width_in: int, width_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., width_out], computed in float32 whatever dtype the model was cast to."""
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x, self.weight.float(), bias)


class Score(nn.Module):
    """Logits of the actions from hidden states: linear, or a two-layer MLP.

    Args:
        config: the adapter's configuration.
        width: D.
    """

    def __init__(self, config: LayerRoutingConfig, width: int) -> None:
        super().__init__()
        codes = config.action_codes
        self.sigmoid = config.gate == "sigmoid"
        self.execute = codes.index(EXECUTE)
        outputs = 1 if self.sigmoid else len(codes)
        hidden = config.router_hidden or max(width // 4 - 200, 16)
        paper = config.init == "paper"
        # the paper's linear router has no bias; ours needs one to start by executing
        self.up = None if config.router in ("linear", "capacity") else Affine(width, hidden)
        self.last = Affine(width if self.up is None else hidden, outputs, bias=not (paper and self.up is None))
        self.relu = config.router_activation == "relu"
        draw = nn.init.kaiming_uniform_ if paper and self.relu else nn.init.xavier_uniform_
        if self.up is not None:
            draw(self.up.weight)
        if paper:
            draw(self.last.weight)
        elif self.last.bias is not None:
            with torch.no_grad():
                self.last.bias[0 if self.sigmoid else self.execute] = EXECUTE_BIAS

    def forward(self, x: Tensor) -> Tensor:
        """Score hidden states.

        Args:
            x: float [..., D].

        Returns:
            float32 [..., A].
        """
        if torch.is_autocast_enabled(x.device.type):
            # autocast would round the logits
            with torch.autocast(x.device.type, enabled=False):
                logits = self._logits(x.float())
        else:
            logits = self._logits(x.float())
        if self.sigmoid:
            pair = [torch.zeros_like(logits), logits] if self.execute == 1 else [logits, torch.zeros_like(logits)]
            logits = torch.cat(pair, dim=-1)
        return logits

    def _logits(self, x: Tensor) -> Tensor:
        if self.up is not None:
            x = self.up(x)
            x = functional.relu(x) if self.relu else functional.gelu(x, approximate="tanh")
        return self.last(x)


class ActionRouter(nn.Module):
    """A learned router: `Score`, and for capacity routing a causal predictor beside it.

    Args:
        config: the adapter's configuration.
        width: D.
    """

    def __init__(self, config: LayerRoutingConfig, width: int) -> None:
        super().__init__()
        self.scorer = Score(config, width)
        # top-k over a sequence looks at later tokens; the predictor learns to do without
        self.predictor = Affine(width, 1) if config.router == "capacity" else None
        if self.predictor is not None:
            nn.init.constant_(self.predictor.bias, EXECUTE_BIAS)

    def predict(self, x: Tensor) -> Tensor:
        """Logits [..., 2] of a causal predictor of the top-k choice; no gradient into the hidden states."""
        logit = self.predictor(x.detach().float())
        zero = torch.zeros_like(logit)
        return torch.cat([zero, logit] if self.scorer.execute == 1 else [logit, zero], dim=-1)


class FixedRouter(HoldsFrozen):
    """The same action for every input.

    Args:
        action: 0 skip or 1 execute.

    Attributes:
        action: float32 frozen parameter [1], so that it is saved, copied and sharded with the adapter.
    """

    action: Tensor

    def __init__(self, action: int) -> None:
        super().__init__()
        self.hold_frozen("action", torch.tensor(float(action)))


class Forecaster(nn.Module):
    r"""A small stand-in for a unit's increment.

        G(x) = W_2 silu(W_1 x + b_1) + b_2,   weights drawn from N(0, 1e-3), zero bias

    Source: Informed Routing, arXiv 2510.13831 (released code; the paper's text leaves the activation out).

    Args:
        width: D.
        hidden: F.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = Affine(width, hidden), Affine(hidden, width)
        nn.init.normal_(self.down.weight, std=1e-3)
        nn.init.normal_(self.up.weight, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast the increment.

        Args:
            x: float [..., D], the unit's input.

        Returns:
            [..., D] in the input's dtype.
        """
        return self.up(functional.silu(self.down(x.float()))).to(x.dtype)


def pooled_logits(
    router: ActionRouter, x_BSD: Tensor, mask_BS: Tensor, pooling: str, windows: Windows | None
) -> Tensor:
    """Logits of a decision for each row.

    Args:
        router: the router.
        x_BSD: float [B, S, D], the unit's input.
        mask_BS: bool [B, S], the prompt's real tokens.
        pooling: "windows", "tokens" or "mean".
        windows: the prompt's windows, for "windows" and "mean".

    Returns:
        float32 [B, A].
    """
    if pooling == "tokens":
        probabilities_BSA = router.scorer(x_BSD).softmax(-1)
        weight_BS = mask_BS.float() / mask_BS.sum(1, keepdim=True).clamp_min(1)
        # a row without prompt has no evidence: its probabilities are all zero, and equal logits execute
        return torch.einsum("bs,bsa->ba", weight_BS, probabilities_BSA).clamp_min(1e-20).log()
    assert windows is not None
    return windows.average(router.scorer(windows.means(x_BSD)))


def choose(logits_NA: Tensor, config: LayerRoutingConfig) -> Tensor:
    """Actions from logits under the present budget.

    interpolation p (Dr.LLM's knob, our reading): argmax of (1 - |p|) softmax(z) + |p| onehot(skip if p < 0 else repeat).
    threshold p: execute iff P(execute) >= p, else the best other action. Equal scores execute.

    Args:
        logits_NA: float32 [N, A].
        config: the configuration; its `budget` is p.

    Returns:
        int64 [N], action codes.
    """
    codes = config.action_codes
    execute = codes.index(EXECUTE)
    code_A = torch.tensor(codes, device=logits_NA.device)
    score_NA = logits_NA
    if config.budget_kind == "interpolation" and config.budget:
        target = SKIP if config.budget < 0 else REPEAT
        target = target if target in codes else EXECUTE
        score_NA = (1 - abs(config.budget)) * logits_NA.softmax(-1)
        score_NA = score_NA + abs(config.budget) * (code_A == target)
    others_NA = score_NA.clone()
    others_NA[:, execute] = -math.inf
    best_N, other_N = others_NA.max(-1)
    if config.budget_kind == "threshold":
        run_N = logits_NA.softmax(-1)[:, execute] >= config.budget
    else:
        run_N = score_NA[:, execute] >= best_N
    return torch.where(run_N, EXECUTE, code_A[other_N])


def choose_rows(logits: list[list[float]], config: LayerRoutingConfig) -> list[int]:
    """`choose` on the host, for the few rows of a batch: one copy from the device instead of a dozen small kernels.

    Args:
        logits: one logit an action for each row.
        config: the configuration; its `budget` is p.

    Returns:
        Action codes.

    Example:
        >>> choose_rows([[0.0, 1.0, 2.0], [3.0, 3.0, 0.0]], LayerRoutingConfig())  # equal scores execute
        [2, 1]
    """
    codes, p, kind = config.action_codes, config.budget, config.budget_kind
    execute = codes.index(EXECUTE)
    target = None
    if kind == "interpolation" and p:
        target = SKIP if p < 0 else REPEAT
        target = target if target in codes else EXECUTE
    actions = []
    for score in logits:
        if target is not None:
            score = [(1 - abs(p)) * q + abs(p) * (code == target) for q, code in zip(_softmax(score), codes)]
        run = _softmax(score)[execute] >= p if kind == "threshold" else score[execute] >= max(score)
        if run:
            actions.append(EXECUTE)
        else:
            others = [index for index in range(len(codes)) if index != execute]
            actions.append(codes[max(others, key=score.__getitem__)])
    return actions


def _softmax(score: list[float]) -> list[float]:
    top = max(score)
    powers = [math.exp(value - top) for value in score]
    total = sum(powers)
    return [power / total for power in powers]


def fixed_layers(config: LayerRoutingConfig, routed: list[int]) -> set[int]:
    """Layers that a fixed router skips: those it names, else its budget's share in its order, else evenly spaced.

    Args:
        config: the configuration.
        routed: the routed layers in order.

    Returns:
        Their indices.

    Example:
        >>> config = LayerRoutingConfig.from_preset("static", budget=0.5, skip_order=[2, 4, 1, 3])
        >>> sorted(fixed_layers(config, [1, 2, 3, 4]))
        [2, 4]
    """
    if config.skip_layers is not None:
        return set(config.skip_layers)
    if config.skip_order is not None:
        return set(config.skip_order[: round(config.budget * len(routed))])
    return evenly_spaced(routed, config.budget)


def evenly_spaced(columns: list[int], rate: float) -> set[int]:
    """Evenly spaced choice of round(rate * n) of n columns.

    Args:
        columns: candidates in order.
        rate: share, in [0, 1].

    Returns:
        The chosen ones.

    Example:
        >>> sorted(evenly_spaced([1, 2, 3, 4, 5, 6, 7, 8], 0.25))
        [3, 7]
    """
    count = round(rate * len(columns))
    return {columns[int((index + 0.5) * len(columns) / count)] for index in range(count)}
