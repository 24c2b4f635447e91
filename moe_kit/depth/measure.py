"""What can be measured on dense hidden states: how well forecasters stand in, and how much each layer changes.

Sources: Informed Routing, arXiv 2510.13831 (recoverability); ShortGPT, arXiv 2403.03853 (block influence).

Shapes: B rows, S sequence, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_kit.depth.config import EXECUTE
from moe_kit.depth.state import find_depth_state
from moe_kit.depth.steer import force_layers
from moe_kit.errors import ConfigError
from moe_kit.hf.layers import find_decoder_layers

Batch = dict[str, Tensor]


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """Sum of the values."""
    return torch.stack(list(losses.values())).sum()


def forecast_losses(model: nn.Module, batch: Batch, *, zero: bool = False) -> dict[str, Tensor]:
    """SmoothL1 between forecast and increment at every unit, on dense hidden states.

    Args:
        model: a model whose active layer routers have forecasters.
        batch: a batch.
        zero: score the predictor that says zero, for comparison.

    Returns:
        Unit path -> mean over real tokens and features.
    """
    state = find_depth_state(model)
    adapter = state.active()
    units = [unit for unit in routed_units(model) if adapter in unit.moe_depth_forecaster]
    found: dict[str, Tensor] = {}
    mask_BS = batch.get("attention_mask")

    def watch(unit: Any) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            out = output[0] if isinstance(output, tuple) else output
            target = out - x if unit.kind == "layer" else out
            with torch.enable_grad():
                forecaster = unit.moe_depth_forecaster[adapter]
                guess = torch.zeros_like(target) if zero else forecaster(x.detach())
                loss_BS = functional.smooth_l1_loss(guess.float(), target.detach().float(), reduction="none").mean(-1)
                weight_BS = torch.ones_like(loss_BS) if mask_BS is None else mask_BS.to(loss_BS)
                found[unit.path] = (loss_BS * weight_BS).sum() / weight_BS.sum().clamp_min(1)

        return hook

    parents = {id(module.depth_unit): module for module in model.modules() if "depth_unit" in module._modules}
    handles = [parents[id(unit)].register_forward_hook(watch(unit), with_kwargs=True) for unit in units]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    dense = torch.full((1, state.num_columns(adapter)), EXECUTE)
    try:
        with torch.no_grad(), force_layers(model, dense):
            model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def routed_units(model: nn.Module) -> list[Any]:
    """The layer-routing units of a model, in module order."""
    return [module._modules["depth_unit"] for module in model.modules() if "depth_unit" in module._modules]


@torch.no_grad()
def layer_importance(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Block influence of every layer: mean over real tokens of 1 - cos(input, output). Low means easy to skip.

    Source: ShortGPT, arXiv 2403.03853.

    Args:
        model: any model with decoder layers; layer routers in it execute everything for the measurement.
        batches: labels are not read.

    Returns:
        float32 [L].

    Raises:
        ConfigError: if no batch is given.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = find_decoder_layers(base).layers
    total, tokens = torch.zeros(len(layers)), 0.0
    current: dict[str, Tensor | None] = {}

    def watch(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            out = output[0] if isinstance(output, tuple) else output
            change_BS = 1 - functional.cosine_similarity(x.float(), out.float(), dim=-1)
            mask_BS = current["mask"]
            total[index] += float(change_BS.sum() if mask_BS is None else (change_BS * mask_BS).sum())

        return hook

    handles = [layer.register_forward_hook(watch(index), with_kwargs=True) for index, layer in enumerate(layers)]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            current["mask"] = batch.get("attention_mask")
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            tokens += float(batch["input_ids"].numel() if current["mask"] is None else current["mask"].sum())
            _dense(model, inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ConfigError("layer_importance needs at least one batch with real tokens.")
    return total / tokens


def _dense(model: nn.Module, inputs: Batch) -> None:
    """A forward pass in which every unit executes."""
    if not routed_units(model):
        model(**inputs, use_cache=False)
        return
    state = find_depth_state(model)
    with force_layers(model, torch.full((1, state.num_columns(state.active())), EXECUTE)):
        model(**inputs, use_cache=False)
