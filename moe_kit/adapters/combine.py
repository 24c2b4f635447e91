r"""`add_weighted_adapter`: the weighted sum of adapters as one adapter, where routed experts have one.

    y = base(x) + sum_a c_a sum_k g_k(x) s_a B_{a,e_k} A_{a,e_k} x

With one decision g for all adapters a, an expert of the sum is the sum of their experts, and matrices of ranks r_a side by
side are that sum exactly (`"cat"`). The decision is one where the routers are equal - adapters of one start whose router
was frozen, tasks' experts under one table, or LoRAs on the base's own experts, which the base routes. Elsewhere a sum of
mixtures has several decisions and is no adapter: several active adapters compute it. What PEFT offers beyond (`"svd"`,
`"ties"`, ...) is defined on one matrix a linear, which `collapse_to_lora` gives where the routing is constant.

Shapes: E experts, L rank, D width in, O width out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_kit.adapters.base_experts import AdaptedExperts
from moe_kit.adapters.config import RoutedAdapterConfig
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.errors import RoutingError
from moe_kit.routing.weight import ConstantWeight

COMBINATIONS = ("cat", "linear")
# rank-one experts are one rank each, so that there is nothing to put beside it
_BANKS = {"cat": ("lora", "shared_a", "split_head"), "linear": ("lora", "shared_a", "split_head", "rank_one")}
# what a decision follows from, beside the router's own state
_DECIDES = (
    "num_experts",
    "top_k",
    "bank",
    "bank_options",
    "scope",
    "scope_options",
    "score",
    "score_options",
    "select",
    "select_options",
    "weight",
    "weight_options",
    "stepper",
    "stepper_options",
    "router_sharing",
    "num_tasks",
    "expert_pattern",
)


def combined_config(
    model: nn.Module, configs: dict[str, RoutedAdapterConfig], weights: Sequence[float], combination_type: str
) -> RoutedAdapterConfig:
    """Configuration of the sum, after a look at whether there is one.

    Args:
        model: the inner model with the adapters.
        configs: configurations of the adapters, by name.
        weights: one for each adapter.
        combination_type: "cat" (exact) or "linear" (PEFT's approximation: factors are added, not products).

    Returns:
        Its targets are the adapters' own, its scale is 1.

    Raises:
        RoutingError: naming what does not fit.
    """
    _check(model, configs, weights, combination_type)
    first = next(iter(configs.values()))
    ranks = {}
    for path, _, banks in _banks(model, list(configs)):
        found = [bank.B.shape[-1] for bank in banks]
        if combination_type == "linear" and len(set(found)) > 1:
            raise RoutingError(f"the experts at {path} have ranks {found}: 'linear' needs one rank, 'cat' takes any.")
        ranks[path] = sum(found) if combination_type == "cat" else found[0]
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != common}
    routed = [path for path, layer in model.named_modules() if isinstance(layer, RoutedLayer) and path in ranks]
    return replace(
        first,
        r=first.r if first.bank == "rank_one" else common,
        # alpha / r = 1, since the scales are in B; rank-one experts divide by their number instead
        lora_alpha=common,
        scale=1.0 if first.bank == "rank_one" else None,
        use_rslora=False,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=routed or None,
        target_parameters=[path for path in ranks if path not in routed] or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


@torch.no_grad()
def fill_combined(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], name: str, combination_type: str
) -> None:
    """Copy the routers and write the combined experts of an adapter that was just added.

    Args:
        model: the inner model.
        adapters: names of the adapters.
        weights: one for each.
        name: the new adapter.
        combination_type: as for `combined_config`.
    """
    for layer in model.modules():
        if isinstance(layer, RoutedLayer) and name in layer.moe_adapter_router:
            layer.moe_adapter_router[name].load_state_dict(layer.moe_adapter_router[adapters[0]].state_dict())
    for _, layer, (*banks, new) in _banks(model, [*adapters, name]):
        factors = [
            weight * bank.scale * _constant(layer, adapter) / (new.scale * _constant(layer, name))
            for adapter, weight, bank in zip(adapters, weights, banks, strict=True)
        ]
        if combination_type == "cat":
            new.B.copy_(torch.cat([factor * bank.B for factor, bank in zip(factors, banks, strict=True)], -1))
            new.A.copy_(torch.cat([bank.A for bank in banks], -2))
        elif getattr(new, "A", None) is None:
            new.B.copy_(sum(factor * bank.B for factor, bank in zip(factors, banks, strict=True)))
        else:
            roots = [math.sqrt(abs(factor)) for factor in factors]
            new.B.copy_(sum(root * bank.B for root, bank in zip(roots, banks, strict=True)))
            signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
            new.A.copy_(sum(root * bank.A for root, bank in zip(signed, banks, strict=True)))


def _check(
    model: nn.Module, configs: dict[str, RoutedAdapterConfig], weights: Sequence[float], combination_type: str
) -> None:
    names = list(configs)
    if len(weights) != len(names):
        raise RoutingError(f"got {len(weights)} weights for {len(names)} adapters, expected one for each.")
    if combination_type not in COMBINATIONS:
        raise RoutingError(
            f"combination_type is {combination_type!r}, expected one of {', '.join(COMBINATIONS)}: the others are defined on "
            "one matrix a linear. Where the routing is constant, collapse_to_lora gives LoRAs, and PEFT combines these."
        )
    first = configs[names[0]]
    for name, config in configs.items():
        differs = [field for field in _DECIDES if getattr(config, field) != getattr(first, field)]
        if differs:
            raise RoutingError(_several(f"{name!r} and {names[0]!r} differ in {', '.join(differs)}"))
        further = [field for field in ("modules_to_save", "trainable_token_indices") if getattr(config, field)]
        if further:
            raise RoutingError(
                f"{name!r} has {', '.join(further)}: trained copies of a module are no sum of adapters. Combine adapters "
                "without."
            )
    routed = any(isinstance(layer, RoutedLayer) and names[0] in layer.moe_adapter_bank for layer in model.modules())
    if routed and first.bank not in _BANKS[combination_type]:
        raise RoutingError(
            f"bank {first.bank!r} cannot be combined by {combination_type!r}: its experts have no rank to add to."
        )
    for path, layer in model.named_modules():
        if not isinstance(layer, RoutedLayer):
            continue
        routers = [layer.moe_adapter_router[name] for name in names if name in layer.moe_adapter_router]
        states = [router.state_dict() for router in routers]
        for state in states[1:]:
            if any(not torch.equal(state[key], value) for key, value in states[0].items()):
                raise RoutingError(_several(f"the routers at {path} have different weights"))


def _several(what: str) -> str:
    return (
        f"{what}, so a sum of these adapters makes several decisions and is no adapter: make them active together "
        "(set_adapter([...]) of a model with native adapters), or train them under one frozen router (freeze_router=True)."
    )


def _banks(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Path of each adapted linear or stack, its layer, and what each adapter has there."""
    for path, layer in model.named_modules():
        if not isinstance(layer, (RoutedLayer, AdaptedExperts)):
            continue
        found = {name: layer.moe_adapter_bank[name] for name in names if name in layer.moe_adapter_bank}
        stacks = {name: dict(bank) if isinstance(bank, nn.ModuleDict) else {"": bank} for name, bank in found.items()}
        for part in dict.fromkeys(part for bank in stacks.values() for part in bank):
            where = f"{path}.{part}" if part else path
            missing = [name for name in names if part not in stacks.get(name, {})]
            if missing:
                raise RoutingError(f"{where} has no adapter {missing[0]!r}: combine adapters of the same targets.")
            yield where, layer, [stacks[name][part] for name in names]


def _constant(layer: nn.Module, name: str) -> float:
    """Weight that a router gives whatever it chooses: ReMix's follows from the rank, which a sum changes."""
    if not isinstance(layer, RoutedLayer):
        return 1.0
    weight = layer.owners[name].moe_adapter_router[name].weight
    return weight.value if isinstance(weight, ConstantWeight) else 1.0
