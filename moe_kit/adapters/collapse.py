"""Constant routing as a plain LoRA, which PEFT can merge, serve and convert.

Where the weights do not depend on the input - averaged skills (MHR-mu), one task's row of a table, or weights that
the caller names - a mixture is one matrix B A, and that is a LoRA.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from moe_kit.adapters.base_experts import AdaptedExperts
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.errors import RoutingError


def collapse_to_lora(
    model: PeftModel, *, task_id: int | None = None, weights: Tensor | str | None = None, name: str | None = None
) -> PeftModel:
    """Replace the active routed adapter by the LoRA that it is under constant weights.

    Args:
        model: a PeftModel whose active adapter is a routed one; it is unloaded, its base goes into the result.
        task_id: row of a task table to keep.
        weights: float [E] for all sites, or "mean" for equal weights that sum to 1 (in each group). This is another
            model than the routed one, unless its routing has these very weights. None takes the router's own weights.
        name: name of the LoRA; None keeps the adapter's.

    Returns:
        A PeftModel with a LoRA adapter, equal in output to the routed one under the constant weights.

    Raises:
        RoutingError: if the routing depends on the input and no weights were given, the weights do not fit, or a bank
            is no matrix under constant weights, or the adapter holds more than linears. The model is then left as it was.

    Example:
        `lora = collapse_to_lora(model, task_id=2); merged = lora.merge_and_unload()`
    """
    adapter = model.active_adapter
    if any(isinstance(m, AdaptedExperts) and adapter in m.moe_adapter_bank for m in model.modules()):
        raise RoutingError(
            f"{adapter!r} also adapts the base's own experts (target_parameters), which a LoRA of linears cannot hold: "
            "train those in an adapter of their own and merge it first."
        )
    layers = {path: module for path, module in model.named_modules() if isinstance(module, RoutedLayer)}
    factors = {}
    for path, layer in layers.items():
        if adapter not in layer.moe_adapter_bank:
            continue
        weights_E = _weights(layer, adapter, task_id, weights)
        with torch.no_grad():
            factors[path.removeprefix("base_model.model.")] = layer.moe_adapter_bank[adapter].lora_factors(weights_E)
    if not factors:
        raise RoutingError(f"the active adapter {adapter!r} has no routed layer to collapse.")
    base = model.unload()
    ranks = {path: A.shape[0] for path, (A, _) in factors.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    config = LoraConfig(
        r=common,
        # alpha / r = 1: the scale is in B
        lora_alpha=common,
        target_modules=list(factors),
        rank_pattern={path: rank for path, rank in ranks.items() if rank != common},
        alpha_pattern={path: rank for path, rank in ranks.items() if rank != common},
    )
    name = name or adapter
    lora = get_peft_model(base, config, adapter_name=name)
    for path, (A, B) in factors.items():
        layer = lora.get_submodule(f"base_model.model.{path}")
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(A)
            layer.lora_B[name].weight.copy_(B)
    return lora


def _weights(layer: RoutedLayer, adapter: str, task_id: int | None, weights: Tensor | str | None) -> Tensor:
    bank = layer.moe_adapter_bank[adapter]
    if weights is None:
        router = layer.owners[adapter].moe_adapter_router[adapter]
        found = router.constant_weights(task_id)
        if found is None:
            raise RoutingError(
                f"the routing at {layer.path} depends on the input (or on a task: give task_id), so it is no LoRA. "
                "Give constant weights, weights='mean' for instance, to make the LoRA of another, averaged model."
            )
        return found
    if isinstance(weights, str):
        if weights != "mean":
            raise RoutingError(f"weights is {weights!r}, expected 'mean', a tensor [E] or none.")
        return torch.full((bank.num_experts,), bank.num_groups / bank.num_experts)
    if weights.shape != (bank.num_experts,):
        raise RoutingError(
            f"weights have shape {tuple(weights.shape)}, {layer.path} needs ({bank.num_experts},): one for each expert."
        )
    return weights.float()
