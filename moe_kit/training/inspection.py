"""What an adapter is made of: adapted modules, parameters, work per token, routers and who shares them.

Work is counted in floating-point operations of the forward pass: a weight that a token meets costs one multiplication
and one addition, so 2 FLOPs. Attention over earlier tokens, norms and activations are left out on both sides. A token
meets K of the E experts at a linear, hence K/E of the bank's weights, and all weights of the router. The same holds for
the stacked experts of a mixture-of-experts base and for the LoRAs on them, with the base's own K and E.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["AdaptedModule", "Inspection", "inspect_model", "print_inspection"]

_INDEX = re.compile(r"\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class AdaptedModule:
    """One adapted linear, or one adapted stack of a base's experts."""

    path: str
    """Module path in the base model."""

    width_in: int
    """Input width D."""

    width_out: int
    """Output width O."""

    experts: int
    """Experts E; 1 for LoRA."""

    active: int
    """Experts K that a token meets, at most."""

    parameters: int
    """Weights of all experts."""

    router: str | None
    """Path of the module whose router decides here; None without a router."""

    router_parameters: int
    """Weights of the router that this module owns; 0 if it shares another one's."""

    @property
    def active_parameters(self) -> int:
        """Expert weights that a token meets."""
        return self.parameters * self.active // self.experts


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Totals of a wrapped model."""

    method: str
    """Preset, or `lora`."""

    modules: tuple[AdaptedModule, ...]
    """Adapted linears in the model's order."""

    base_parameters: int
    """Parameters of the base model."""

    trainable_parameters: int
    """Parameters with a gradient."""

    base_flops: int
    """FLOPs a token of the base model's forward pass: 2 for each weight of its linears, active experts, output head."""

    @property
    def active_parameters(self) -> int:
        """Adapter and router weights that a token meets."""
        return sum(m.active_parameters + m.router_parameters for m in self.modules)

    @property
    def extra_flops(self) -> int:
        """FLOPs a token that the adapter adds to the forward pass."""
        return 2 * self.active_parameters

    @property
    def routers(self) -> dict[str, list[str]]:
        """Owner of each router -> paths of the linears it decides for."""
        groups: dict[str, list[str]] = {}
        for module in self.modules:
            if module.router is not None:
                groups.setdefault(module.router, []).append(module.path)
        return groups


def inspect_model(model: Any, adapter_name: str = "default") -> Inspection:
    """Look at a PEFT model with one routed or LoRA adapter.

    Args:
        model: The PEFT model.
        adapter_name: Which adapter.

    Returns:
        Modules and totals.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    from moe_kit.adapters import RoutedLayer
    from moe_kit.adapters.base_experts import AdaptedExperts
    from moe_kit.hf.experts import stacked_weights

    chosen_by_base = getattr(model.get_base_model().config.get_text_config(), "num_experts_per_tok", None)
    config = model.peft_config[adapter_name]
    modules, adapter_parameters, weights = [], 0, 0
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, RoutedLayer) and adapter_name in module.moe_adapter_bank:
            bank, owner = module.moe_adapter_bank[adapter_name], module.owners[adapter_name]
            own = module.moe_adapter_router[adapter_name].parameters() if owner is module else ()
            chosen = min(config.top_k, bank.num_experts) if config.select in ("top_k", "sample_k") else bank.num_experts
            modules.append(
                AdaptedModule(
                    path=name,
                    width_in=module.width_in,
                    width_out=module.width_out,
                    experts=bank.num_experts,
                    active=chosen,
                    parameters=_count(bank.parameters()),
                    router=owner.path,
                    router_parameters=_count(own),
                )
            )
        elif isinstance(module, AdaptedExperts) and adapter_name in module.moe_adapter_bank:
            for stack, lora in module.moe_adapter_bank[adapter_name].items():
                experts, _, width_in = lora.A.shape
                modules.append(
                    AdaptedModule(
                        path=f"{name}.{stack}",
                        width_in=width_in,
                        width_out=lora.B.shape[1],
                        experts=experts,
                        active=min(chosen_by_base or experts, experts),
                        parameters=_count(lora.parameters()),
                        router=None,
                        router_parameters=0,
                    )
                )
        elif isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            both = [*module.lora_A[adapter_name].parameters(), *module.lora_B[adapter_name].parameters()]
            modules.append(
                AdaptedModule(
                    path=name,
                    width_in=module.in_features,
                    width_out=module.out_features,
                    experts=1,
                    active=1,
                    parameters=_count(both),
                    router=None,
                    router_parameters=0,
                )
            )
        elif isinstance(module, (torch.nn.Linear, Conv1D)) and ".lora_" not in name and "moe_adapter" not in name:
            weights += module.weight.numel()
        for stack in stacked_weights(module).values():
            weights += stack.numel() * min(chosen_by_base or len(stack), len(stack)) // len(stack)
    adapter_parameters = sum(m.parameters + m.router_parameters for m in modules)
    return Inspection(
        method=getattr(config, "preset", None) or str(getattr(config.peft_type, "value", config.peft_type)).lower(),
        modules=tuple(modules),
        base_parameters=_count(model.parameters()) - adapter_parameters,
        trainable_parameters=_count(p for p in model.parameters() if p.requires_grad),
        base_flops=2 * weights,
    )


def print_inspection(found: Inspection, console: Console) -> None:
    """Print an inspection as two tables and a few lines.

    Args:
        found: What `inspect_model` returned.
        console: Where to write.
    """
    experts_too = any(module.router is None and module.experts > 1 for module in found.modules)
    table = Table(
        title=f"{found.method}: {len(found.modules)} adapted {'weights' if experts_too else 'linears'}",
        title_justify="left",
    )
    for name in ("modules", "count", "in -> out", "experts", "active", "parameters"):
        table.add_column(name, justify="left" if name == "modules" else "right", no_wrap=name != "modules")
    for pattern, group in _grouped(found.modules).items():
        one = group[0]
        table.add_row(
            pattern,
            str(len(group)),
            f"{one.width_in} -> {one.width_out}",
            _span(m.experts for m in group),
            _span(m.active for m in group),
            f"{sum(m.parameters for m in group):,}",
        )
    console.print(table)
    share = Counter(
        (_INDEX.sub(".*.", owner).rpartition(".")[0], ", ".join(path.rpartition(".")[2] for path in paths))
        for owner, paths in found.routers.items()
    )
    if share:
        routers = Table(title=f"{len(found.routers)} routers", title_justify="left")
        for name in ("in", "decides for", "count"):
            routers.add_column(name, justify="right" if name == "count" else "left")
        for (parent, names), count in share.items():
            routers.add_row(parent, names if len(names) < 60 else f"{names[:57]}...", str(count))
        console.print(routers)
    router_parameters = sum(m.router_parameters for m in found.modules)
    console.print(f"base parameters        {found.base_parameters:>13,}")
    console.print(
        f"trainable parameters   {found.trainable_parameters:>13,}"
        f"  ({100 * found.trainable_parameters / found.base_parameters:.2f} % of the base; routers {router_parameters:,})"
    )
    console.print(f"active for one token   {found.active_parameters:>13,}  of the adapter's, routers included")
    console.print(
        f"FLOPs for one token    {found.base_flops + found.extra_flops:>13,}"
        f"  (base {found.base_flops:,}, adapter {found.extra_flops:,} = +{100 * found.extra_flops / found.base_flops:.2f} %)"
    )


def _count(parameters: Any) -> int:
    """Sum the sizes of parameters."""
    return sum(p.numel() for p in parameters)


def _grouped(modules: tuple[AdaptedModule, ...]) -> dict[str, list[AdaptedModule]]:
    """Group modules that differ only in layer indices and have the same widths."""
    groups: dict[str, list[AdaptedModule]] = {}
    for module in modules:
        groups.setdefault(_INDEX.sub(".*.", module.path), []).append(module)
    return groups


def _span(values: Any) -> str:
    """Show one value, or the range of several."""
    low, high = min(values := list(values)), max(values)
    return str(low) if low == high else f"{low}-{high}"
