r"""Finding the budget at which a wanted share of the work is saved, on examples instead of by guessing.

A router that was trained to a rate does not run at it: a Gumbel router samples with the probability that its decision
then only compares with one half, so one that executes each token with probability 0.75 saves a quarter in training and
nothing afterwards. The knob of every preset moves the saved share one way; bisection finds the place.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_kit.depth.state import find_depth_state
from moe_kit.depth.steer import layer_applications, set_budget
from moe_kit.errors import ConfigError

Batch = dict[str, Tensor]

# log-odds at which a threshold in float32 is as good as 0 or 1
_FARTHEST = 16.0


@torch.no_grad()
def calibrate_budget(
    model: nn.Module, batches: Sequence[Batch], saved: float, *, tolerance: float = 0.005, passes: int = 16
) -> tuple[float, float]:
    """Move the compute knob to where a share of the routed work is saved on some batches; no weight changes.

    Args:
        model: a model with one active layer-routing adapter.
        batches: `input_ids`, `attention_mask`, and `labels` where only the tokens before them may decide.
        saved: share of the routed units' applications to save, in [0, 1]. An attention and an MLP count the same, an
            approximated unit as saved, a repeated one as executed twice.
        tolerance: how near to `saved` is near enough, above 0.
        passes: passes over the batches at most, 1 or more.

    Returns:
        The budget, which is set, and the share that it saves on these batches: the nearest found, where the share
        jumps over the wanted one.

    Raises:
        ConfigError: no batch, a value outside its range, or a static router whose layers are named.
        RoutingError: if the model has no active layer routers.
    """
    if not 0.0 <= saved <= 1.0:
        raise ConfigError(f"saved is {saved}, expected a share in [0, 1].")
    if tolerance <= 0.0 or passes < 1:
        raise ConfigError(f"tolerance is {tolerance} and passes {passes}, expected above 0 and 1 or more.")
    if not batches:
        raise ConfigError("calibrate_budget needs at least one batch.")
    state = find_depth_state(model)
    adapter = state.active()
    kind, before = state.configs[adapter].budget_kind, state.configs[adapter].budget
    was_training = model.training
    model.eval()
    try:
        if kind == "rate":
            set_budget(model, saved)
            return saved, _saved_share(model, batches)
        low, high, tried = 0.0, 1.0, []
        for _ in range(passes):
            middle = (low + high) / 2
            set_budget(model, _knob(kind, middle))
            share = _saved_share(model, batches)
            tried.append((abs(share - saved), _knob(kind, middle), share))
            if tried[-1][0] <= tolerance:
                break
            low, high = (middle, high) if share < saved else (low, middle)
        _, budget, share = min(tried)
        set_budget(model, budget)
        return budget, share
    except BaseException:
        # an interrupted search leaves the knob where it was
        state.configs[adapter].budget = before
        raise
    finally:
        model.train(was_training)


def _knob(kind: str, place: float) -> float:
    """Budget at a place in [0, 1] between most work and least; 0.5 is the router's own decision."""
    if kind == "interpolation":
        return 1 - 2 * place
    return 1 / (1 + math.exp(_FARTHEST * (1 - 2 * place)))


def _saved_share(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Share of the routed units' applications that are saved, mean over rows."""
    state = find_depth_state(model)
    adapter = state.active()
    routed = len(state.units[adapter]) / (1 if state.configs[adapter].units == "layer" else 2)
    saved, rows = 0.0, 0
    for batch in batches:
        model(**batch, use_cache=False)
        saved += float((1 - layer_applications(model).double()).sum())
        rows += batch["input_ids"].shape[0]
    return saved / (rows * routed)
