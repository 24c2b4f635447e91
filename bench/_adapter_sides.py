"""Sides of the adapter benchmark: a base model -> the same model with adapters of one method.

Every side adapts all seven linears of each layer with 8 experts of rank 8 (LoRA: one of rank 16 or 64). What a method
does by its nature stays: mixlora mixes in the feed-forward block and puts plain LoRA on attention, X-LoRA runs the base
twice, PEFT computes every expert and masks.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn

from moe_kit import RoutedAdapterConfig
from moe_kit.routing.select import stable_top_k

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoopOfExperts(nn.Module):
    """The baseline everybody writes: a router a linear, and a loop over experts with boolean indexing."""

    def __init__(self, base: nn.Linear, num_experts: int, top_k: int, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.top_k, self.scale = base, top_k, scale
        self.router = nn.Linear(base.in_features, num_experts, bias=False)
        self.A = nn.ParameterList(torch.randn(rank, base.in_features) * 0.02 for _ in range(num_experts))
        self.B = nn.ParameterList(torch.zeros(base.out_features, rank) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus the chosen experts."""
        flat = x.reshape(-1, x.shape[-1])
        probabilities = self.router(flat).softmax(-1)
        ids = stable_top_k(probabilities.detach(), self.top_k)
        weights = probabilities.gather(-1, ids)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros(*flat.shape[:-1], self.base.out_features)
        for expert, (a, b) in enumerate(zip(self.A, self.B, strict=True)):
            token, slot = torch.where(ids == expert)
            if len(token):
                delta = F.linear(F.linear(flat[token], a), b) * weights[token, slot, None] * self.scale
                out.index_add_(0, token, delta)
        return self.base(x) + out.view(*x.shape[:-1], -1)


def with_loop(model: nn.Module, num_experts: int = 8, top_k: int = 2, rank: int = 8) -> nn.Module:
    """Replace every target linear by a loop over experts."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS:
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, LoopOfExperts(module, num_experts, top_k, rank, 2.0))
    return model


def lora(model: nn.Module, rank: int) -> nn.Module:
    """PEFT LoRA."""
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM"))


def routed(model: nn.Module, preset: str, **overrides: Any) -> nn.Module:
    """One of our presets."""
    config = RoutedAdapterConfig.from_preset(
        preset,
        **{"num_experts": 8, "top_k": 2, "r": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **overrides},
    )
    return get_peft_model(model, config)


def poly(model: nn.Module) -> nn.Module:
    """PEFT Poly, 8 skills of rank 8."""
    config = PolyConfig(r=8, n_skills=8, n_tasks=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def xlora(model: nn.Module, num_experts: int = 8, top_k: int = 2, rank: int = 8) -> nn.Module:
    """PEFT X-LoRA: random LoRAs read from a folder, trained along with a classifier that scales them by token and layer.

    Args:
        model: its cache must be off, as X-LoRA demands.
        num_experts: LoRAs.
        top_k: LoRAs that are not masked.
        rank: of each.
    """
    # the plain modules on the same weights, since X-LoRA reads its experts from disk
    source = get_peft_model(
        with_shared_weights(model),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    with tempfile.TemporaryDirectory() as folder:
        names = {str(expert): f"{folder}/{expert}" for expert in range(num_experts)}
        for place in names.values():
            for name, parameter in source.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.02)
            source.save_pretrained(place)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            adapters=names,
            top_k_lora=top_k,
            layerwise_scalings=True,
            use_trainable_adapters=True,
        )
        return get_peft_model(model, config)


def mixlora(model: nn.Module, num_experts: int = 8, top_k: int = 2, rank: int = 8) -> nn.Module:
    """The mixlora package's layers with fresh weights; it loads adapters and does not train, so we register them here.

    Its dropout, which it demands to be positive, is taken out: no other side has any. It computes no balance loss.

    Args:
        model: a Llama.
        num_experts: experts of a feed-forward block.
        top_k: experts a token.
        rank: of each expert, and of the LoRAs on attention.
    """
    import mixlora as package

    config = package.MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "",
            "task_type": "CAUSAL_LM",
            "peft_type": "MIXLORA",
            "routing_strategy": "mixlora",
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.05,
            "target_modules": TARGETS,
            "num_experts": num_experts,
            "top_k": top_k,
            "act_fn": model.config.hidden_act,
        }
    )
    config.dtype_, config.adapter_name_ = torch.float32, "default"
    model.requires_grad_(False)
    fresh: dict[str, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        gate = torch.randn(num_experts, model.config.hidden_size) * 0.02
        fresh[f"mixlora.layers.{index}.mlp.moe_gate.weight"] = nn.Parameter(gate)
        for part, block in (("self_attn", layer.self_attn), ("mlp", layer.mlp)):
            for name, linear in block.named_children():
                if name in TARGETS:
                    prefix = f"mixlora.layers.{index}.{part}.{name}"
                    for end in [""] if part == "self_attn" else [f".experts.{e}" for e in range(num_experts)]:
                        fresh[f"{prefix}{end}.lora_A.weight"] = torch.randn(rank, linear.in_features) * 0.02
                        fresh[f"{prefix}{end}.lora_B.weight"] = torch.zeros(linear.out_features, rank)
    package.inject_adapter_in_model(model, config, fresh)
    loras = [module for module in model.modules() if type(module).__name__ == "LoraLinear"]
    for layer in model.model.layers:
        # plain dictionaries, in which neither an optimizer nor `train` would find them
        block = layer.mlp.mixlora_moes["default"]
        loras += block.experts_.values()
        layer.mlp.register_parameter("mixlora_gate", block.gate_)
        layer.mlp.mixlora_experts = nn.ModuleList(
            nn.ModuleList([expert.lora_A, expert.lora_B]) for expert in block.experts_.values()
        )
    for module in loras:
        module.dropout_ = nn.Identity()
    return model


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A model of its own modules on the same weights: where a copy's weights happen to lie in memory is worth 10 %."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


SIDES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "peft lora r16": lambda model: lora(model, 16),
    "peft lora r64": lambda model: lora(model, 64),
    "moe_kit 8x8 top-2": lambda model: routed(model, "mixture_of_lora"),
    "moe_kit 64x8 top-2": lambda model: routed(model, "mixture_of_lora", num_experts=64),
    "loop 8x8 top-2": with_loop,
    "peft poly 8x8": poly,
    "peft x-lora 8x8 top-2": xlora,
    "mixlora 8x8 top-2": mixlora,
}
"""Name -> builder; the first is what all are compared with."""


def missing() -> dict[str, str]:
    """Sides that cannot run here, with the reason."""
    if importlib.util.find_spec("mixlora") is None:
        return {"mixlora 8x8 top-2": "the package is not installed: pip install --no-deps mixlora==0.2.3"}
    return {}
