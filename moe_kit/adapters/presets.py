"""Published methods as field values of `RoutedAdapterConfig`.

A preset lists the shared rules that it breaks by its nature, with the reason; the tests check that a listed rule
really fails and that all others hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from moe_kit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One published method.

    Attributes:
        summary: one line.
        source: paper.
        fields: values of `RoutedAdapterConfig`.
        derive: further values that depend on what the user overrides.
        breaks: rule name -> why this method breaks it by nature.
    """

    summary: str
    source: str
    fields: Mapping[str, Any]
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    breaks: Mapping[str, str] = field(default_factory=dict)

    def values(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Field values of the preset, given what the user set."""
        values = {name: copy(value) for name, value in self.fields.items()}
        if self.derive is not None:
            values.update(self.derive({**values, **overrides}))
        return values


_SKILLS: dict[str, Any] = {
    "bank": "split_head",
    "scope": "task",
    "score": "task_table",
    "select": "all",
    "weight": "relaxed_bernoulli",
    "router_sharing": "none",
    "lora_alpha": 1.0,
    # two speeds are essential: the published recipe trains the table a hundred times faster
    "router_lr": 0.1,
}
_AVERAGED = {
    "mixture_is_the_weighted_sum": "parameters are averaged before the product, so terms of two skills occur",
}

PRESETS: dict[str, Preset] = {
    "mixture_of_lora": Preset(
        summary="softmax top-k over LoRA experts with the Switch balance loss (what MixLoRA does to a linear)",
        source="arXiv 2404.15159",
        fields={"select": "top_k", "weight": "selected_softmax", "losses": {"switch": 1e-2}},
    ),
    "remix": Preset(
        summary="constant weights, experts sampled without replacement, router trained by leave-one-out rewards",
        source="arXiv 2603.10160",
        fields={"select": "sample_k", "weight": "remix", "scale": 1.0, "detach_router_input": True, "use_rslora": True},
    ),
    "dense_lora_moe": Preset(
        # with data of two types: losses={"cv_typed": 1e-2} and routing_inputs(model, task_types=...)
        summary="every expert, softmax weights, importance kept even (LoRAMoE; its two data types by losses='cv_typed')",
        source="arXiv 2312.09979",
        fields={"select": "all", "weight": "softmax", "losses": {"cv_importance": 1e-2}, "num_experts": 6},
    ),
    "hydralora": Preset(
        summary="one down projection for all experts, every up projection by softmax",
        source="arXiv 2404.19245",
        fields={"bank": "shared_a", "select": "all", "weight": "softmax", "num_experts": 3},
    ),
    "expert_choice": Preset(
        summary="experts choose tokens, each sequence on its own: even loads, no balance loss; for bidirectional models",
        source="arXiv 2202.09368, 2604.01622",
        fields={"select": "expert_choice", "weight": "selected_softmax", "losses": {"z": 1e-3}},
        breaks={
            "the_future_does_not_change_the_past": "experts compare a token with all others of its sequence",
            "decoding_with_a_cache_equals_the_full_pass": "a token that comes alone has no others to compete with",
        },
    ),
    "loss_free": Preset(
        summary="sigmoid gates, choice shifted by a bias that moves against the loads once a step, no balance loss",
        source="arXiv 2408.15664, 2412.19437",
        fields={
            "select": "top_k",
            "weight": "sigmoid",
            "weight_options": {"renormalise": True},
            "stepper": "loss_free",
        },
    ),
    "adamole": Preset(
        summary="a threshold learned from the input decides how many experts a token has",
        source="arXiv 2405.00361",
        fields={"select": "learned_threshold", "weight": "excess", "losses": {"switch_weights": 1e-3}},
    ),
    "remoe": Preset(
        summary="ReLU gates, fully differentiable; a controller steers the sparsity to top_k of num_experts",
        source="arXiv 2412.14711",
        fields={"select": "positive", "weight": "relu", "losses": {"relu_l1": 1.0}, "stepper": "sparsity"},
    ),
    "flylora": Preset(
        summary="rank-one experts behind a frozen sparse projection that is the router as well; nothing to train there",
        source="arXiv 2510.08396",
        fields={
            "bank": "rank_one",
            "score": "frozen_sparse",
            "select": "top_k",
            "weight": "raw",
            "stepper": "loss_free",
            "stepper_options": {"gate": "none", "rate": 1e-3},
            "router_sharing": "none",
            "num_experts": 32,
            "top_k": 8,
            "lora_alpha": 64.0,
        },
        breaks={
            "one_expert_is_the_plain_adapter": "a weight is the expert's own projection of the input, never 1",
            "mixture_is_the_weighted_sum": "an expert without its weight has no down projection to apply",
        },
    ),
    "poly": Preset(
        summary="skills mixed in parameter space by a table of tasks",
        source="arXiv 2202.13914",
        fields={**_SKILLS, "bank_options": {"heads": 1}, "num_experts": 4},
        breaks=_AVERAGED,
    ),
    "mhr": Preset(
        summary="as poly, for each head of a split layer on its own (published: 64 heads, 8 skills, rank 1)",
        source="arXiv 2211.03831",
        fields={**_SKILLS, "bank_options": {"heads": 8}},
        breaks=_AVERAGED,
    ),
    "mhr_z": Preset(
        summary="mhr on a new task: skills frozen, a fresh table is all that trains",
        source="arXiv 2211.03831",
        fields={**_SKILLS, "bank_options": {"heads": 8}, "freeze_experts": True, "num_tasks": 1},
        breaks=_AVERAGED,
    ),
    "mhr_mu": Preset(
        summary="mhr with equal weights for all skills: the averaged adapter is trained, and collapses to a LoRA",
        source="arXiv 2211.03831",
        fields={
            "bank": "split_head",
            "bank_options": {"heads": 8},
            "score": "uniform",
            "select": "all",
            "weight": "mean",
            "lora_alpha": 1.0,
        },
        breaks=_AVERAGED,
    ),
    "mola": Preset(
        summary="mixture_of_lora with more experts in upper layers",
        source="arXiv 2402.08562",
        fields={
            "select": "top_k",
            "weight": "selected_softmax",
            "losses": {"switch": 1e-2},
            "expert_layout": [2, 4, 6, 8],
        },
    ),
}


def get_preset(name: str) -> Preset:
    """Look a preset up.

    Args:
        name: name of the preset.

    Raises:
        ConfigError: if there is none of that name; the nearest is suggested.
    """
    if name not in PRESETS:
        from moe_kit.hf.fields import suggestion

        raise ConfigError(f"there is no preset {name!r}.{suggestion(name, list(PRESETS))}")
    return PRESETS[name]
