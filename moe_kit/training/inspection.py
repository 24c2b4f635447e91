"""What an adapter is made of: adapted modules, parameters, work per token, routers and who shares them.

Work is counted in floating-point operations of an inference forward pass: a weight that a token meets costs one
multiplication and one addition, so 2 FLOPs. Attention over earlier tokens, norms and activations are left out on both
sides. A token meets K of the E experts at a linear, hence K/E of what each expert has for itself, all of what experts
share (one A for all of them), and the router's matrices, trained or frozen; of a table of tasks it meets one row. The
same holds for the stacked experts of a mixture-of-experts base and for the LoRAs on them, with the base's own K and E.

K is exact for a fixed choice, a bound where the input decides how many experts there are (top-p, thresholds, ReLU
gates) or places run out (capacity), and an average where experts choose tokens. A router that decides once for a
sequence or a task is counted as if it decided for the token.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["AdaptedModule", "Inspection", "active_experts", "inspect_model", "print_inspection"]

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
    """Experts K that a token meets; `active_form` says whether exactly, at most or on average."""

    active_form: str = "{}"
    """How to read `active`: a text with a place for the number, such as "up to {}"."""

    parameters: int
    """Weights of all experts, trained or frozen."""

    shared_parameters: int = 0
    """Those of them that every token meets, whichever experts it has."""

    router: str | None
    """Path of the module whose router decides here; None without a router."""

    router_parameters: int
    """Parameters of the router that this module owns; 0 if it shares another one's."""

    router_active: int = 0
    """Weights of that router that a token meets, frozen ones included."""

    @property
    def active_parameters(self) -> int:
        """Expert weights that a token meets; read like `active`."""
        return self.shared_parameters + (self.parameters - self.shared_parameters) * self.active // self.experts


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
        """Adapter and router weights that a token meets; `active_form` says how to read it."""
        return sum(m.active_parameters + m.router_active for m in self.modules)

    @property
    def active_form(self) -> str:
        """How to read `active_parameters` and `extra_flops`: a text with a place for the number."""
        forms = [m.active_form for m in self.modules if m.active_form != "{}"]
        # without what a count of experts aims at
        return forms[0].partition(",")[0] if forms else "{}"

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
    from moe_kit.routing.frozen import trainable_kinds

    chosen_by_base = getattr(model.get_base_model().config.get_text_config(), "num_experts_per_tok", None)
    config = model.peft_config[adapter_name]
    modules, weights = [], 0
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, RoutedLayer) and adapter_name in module.moe_adapter_bank:
            bank, owner = module.moe_adapter_bank[adapter_name], module.owners[adapter_name]
            router = owner.moe_adapter_router[adapter_name]
            active, form = active_experts(config, router, bank.num_experts)
            modules.append(
                AdaptedModule(
                    path=name,
                    width_in=module.width_in,
                    width_out=module.width_out,
                    experts=bank.num_experts,
                    active=active,
                    active_form=form,
                    parameters=_count(bank.parameters()),
                    shared_parameters=_count(w for w in bank.parameters() if not _is_stack(w, bank.num_experts)),
                    router=owner.path,
                    router_parameters=_count(trainable_kinds(router)) if owner is module else 0,
                    router_active=_met(router) if owner is module else 0,
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
        elif isinstance(module, (torch.nn.Linear, Conv1D)) and not _is_added(name):
            weights += module.weight.numel()
        for stack in stacked_weights(module).values():
            weights += stack.numel() * min(chosen_by_base or len(stack), len(stack)) // len(stack)
    return Inspection(
        method=getattr(config, "preset", None) or str(getattr(config.peft_type, "value", config.peft_type)).lower(),
        modules=tuple(modules),
        base_parameters=_count(p for name, p in model.named_parameters() if not _is_added(name)),
        trainable_parameters=_count(p for p in model.parameters() if p.requires_grad),
        base_flops=2 * weights,
    )


def active_experts(config: Any, router: Any, num_experts: int) -> tuple[int, str]:
    """How many experts of a routed linear a token meets.

    Args:
        config: The adapter's `RoutedAdapterConfig`.
        router: Its router at that linear.
        num_experts: Experts there, E.

    Returns:
        A number, and how to read it: "{}" exactly, "up to {}", "{} on average", ...
    """
    wanted = min(config.top_k, num_experts)
    if config.select == "all" or getattr(router.weight, "computes_all", False):
        return num_experts, "{}"
    if config.select in ("top_k", "sample_k"):
        return wanted, "{}"
    if config.select == "capacity":
        # choices that find no place are dropped
        return wanted, "up to {}"
    by_threshold = config.select_options.get("threshold") is not None
    if config.select == "expert_choice" and not by_threshold:
        if config.select_options.get("schedule") is not None:
            return min(config.select_options["k_max"], num_experts), "up to {} on average"
        return wanted, "{} on average"
    # the input decides: any number up to all, which a threshold or a controller may steer
    return num_experts, f"up to {{}}, aims at {wanted}" if by_threshold or config.stepper == "sparsity" else "up to {}"


def print_inspection(found: Inspection, console: Console) -> None:
    """Print an inspection as two tables and a few lines.

    Args:
        found: What `inspect_model` returned.
        console: Where to write.
    """
    experts_too = any(module.router is None and module.experts > 1 for module in found.modules)
    table = Table(
        title=f"{escape(found.method)}: {len(found.modules)} adapted {'weights' if experts_too else 'linears'}",
        title_justify="left",
    )
    for name in ("modules", "count", "in -> out", "experts", "active", "parameters"):
        table.add_column(name, justify="left" if name == "modules" else "right", no_wrap=name != "modules")
    for pattern, group in _grouped(found.modules).items():
        one = group[0]
        table.add_row(
            escape(pattern),
            str(len(group)),
            f"{one.width_in} -> {one.width_out}",
            _span(m.experts for m in group),
            one.active_form.format(_span(m.active for m in group)),
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
            routers.add_row(escape(parent), escape(names if len(names) < 60 else f"{names[:57]}..."), str(count))
        console.print(routers)
    router_parameters = sum(m.router_parameters for m in found.modules)
    console.print(f"base parameters        {found.base_parameters:>13,}")
    console.print(
        f"trainable parameters   {found.trainable_parameters:>13,}"
        f"  ({100 * found.trainable_parameters / found.base_parameters:.2f} % of the base; routers {router_parameters:,})"
    )
    active, extra, both = (
        found.active_form.format(f"{number:,}")
        for number in (found.active_parameters, found.extra_flops, found.base_flops + found.extra_flops)
    )
    console.print(f"active for one token   {active:>13}  of the adapter's, routers included")
    console.print(
        f"FLOPs for one token    {both:>13}"
        f"  (base {found.base_flops:,}, adapter {extra} = +{100 * found.extra_flops / found.base_flops:.2f} %)"
    )


def _count(tensors: Any) -> int:
    """Sum the sizes of tensors."""
    return sum(t.numel() for t in tensors)


def _is_stack(weight: Any, experts: int) -> bool:
    """Whether a weight has a slice for each expert; banks keep these in three dimensions, expert first."""
    return weight.dim() == 3 and weight.shape[0] == experts


def _met(router: Any) -> int:
    """Count the weights of a router that a token meets."""
    from moe_kit.routing.frozen import frozen_parameters
    from moe_kit.routing.score import TaskTableScore

    if isinstance(router.scorer, TaskTableScore):
        return router.num_experts
    # vectors among the frozen are counts, biases of the choice and thresholds
    state = {id(value) for value in frozen_parameters(router) if value.dim() == 1}
    # the matrix of the noise acts in training only
    names = router.named_parameters()
    return _count(p for name, p in names if not name.endswith("noise_weight") and id(p) not in state)


def _is_added(name: str) -> bool:
    """Whether a module or parameter is an adapter's, or the trained copy of one of the base's."""
    return any(part.startswith(("lora_", "moe_adapter_")) or part == "modules_to_save" for part in name.split("."))


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
