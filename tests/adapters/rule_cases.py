"""The presets and variants that the rules of `test_rules.py` run on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model

from moe_kit import RoutedAdapterConfig, routing_inputs
from moe_kit.adapters.presets import PRESETS
from moe_kit.routing import Router
from tests.tiny import tiny_llama, wake_banks

ADAPTER = "skills_a"
NUM_EXPERTS = 4
PROMPT = 3


@dataclass
class Case:
    """A preset with overrides."""

    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    heals: frozenset[str] = frozenset()
    further_breaks: dict[str, str] = field(default_factory=dict)
    random_in_training: bool = False

    @property
    def breaks(self):
        return (set(PRESETS[self.preset].breaks) | set(self.further_breaks)) - self.heals

    def config(self, **more):
        values = {"num_experts": NUM_EXPERTS, "top_k": 2, "r": 3, "target_modules": "all-linear"}
        known = PRESETS[self.preset].fields
        if known.get("scope") == "task":
            values["num_tasks"] = 3
        if "expert_layout" in known:
            values["expert_layout"] = [2, 4]
        return RoutedAdapterConfig.from_preset(self.preset, **{**values, **self.overrides, **more})

    def base(self):
        return tiny_llama().eval()

    def model(self, *, awake=True, base=None, **more):
        model = get_peft_model(base or self.base(), self.config(**more), adapter_name=ADAPTER)
        if awake:
            wake_banks(model)
            wake_routers(model)
        return model.eval()

    def inputs(self, model, rows):
        """Context of a forward pass: task ids and prompt length where the case needs them."""
        given = {}
        if model.peft_config[ADAPTER].scope == "task":
            given["task_ids"] = [index % 3 for index in rows]
        if model.peft_config[ADAPTER].scope in ("sequence", "request"):
            given["prompt_length"] = PROMPT
        return routing_inputs(model, **given)

    def logits(self, model, ids, mask=None, rows=None):
        with self.inputs(model, rows if rows is not None else range(ids.shape[0])):
            return model(input_ids=ids, attention_mask=mask).logits


CASES = {name: Case(name) for name in PRESETS}
CASES["expert_choice"].overrides["causal_leak"] = "allow"
for _name in ("mhr", "mhr_z", "mhr_mu"):
    CASES[_name].overrides["bank_options"] = {"heads": 2}
CASES |= {
    "remix/sequence": Case("remix", {"scope": "sequence"}),
    "remix/request": Case("remix", {"scope": "request"}),
    "request": Case("mixture_of_lora", {"scope": "request", "scope_options": {"pool": "probabilities"}}),
    "expert_choice/ema": Case(
        "expert_choice",
        {"select_options": {"threshold": "ema"}},
        heals=frozenset(PRESETS["expert_choice"].breaks),
    ),
    "expert_choice/zhou": Case(
        "expert_choice", {"causal_leak": "allow", "select_options": {"gate": "softmax"}, "weight": "softmax"}
    ),
    # the surveys' name of FlyLoRA's score
    "flylora/identity": Case("flylora", {"score": "identity"}),
    "flylora/dropout": Case("flylora", {"dropout": 0.3}, random_in_training=True),
    "flylora/absolute": Case("flylora", {"select_options": {"absolute": True}, "detach_router_input": True}),
    "loss_free/quantile": Case("loss_free", {"stepper_options": {"rule": "quantile", "bins": 50}}),
    "capacity/switch": Case(
        "mixture_of_lora",
        {"select": "capacity", "top_k": 1, "weight": "softmax"},
        further_breaks={"decoding_with_a_cache_equals_the_full_pass": "a token that comes alone always finds room"},
    ),
    "capacity/gshard": Case(
        "mixture_of_lora",
        {"select": "capacity", "select_options": {"policy": "gshard"}, "causal_leak": "allow"},
        further_breaks={
            "decoding_with_a_cache_equals_the_full_pass": "a token that comes alone always finds room",
            "the_future_does_not_change_the_past": "second choices wait for the first choices of later tokens",
        },
        random_in_training=True,
    ),
    "top_p": Case("mixture_of_lora", {"select": "top_p", "select_options": {"p": 0.6}}),
    "noisy": Case("mixture_of_lora", {"score": "noisy_linear", "losses": {"cv_load": 1e-2}}, random_in_training=True),
    "straight_through": Case(
        "mixture_of_lora",
        {"weight": "straight_through", "select_options": {"gumbel": True}, "losses": {}},
        random_in_training=True,
    ),
    "mlp": Case("mixture_of_lora", {"score": "mlp", "score_options": {"hidden": 5, "activation": "tanh"}}),
    "dense_mixer": Case("mixture_of_lora", {"weight": "dense_mixer"}),
    "prototype": Case("mixture_of_lora", {"score": "prototype", "score_options": {"metric": "cosine"}}),
}


def wake_routers(model, std=0.5):
    """Routers far from their start, balance state off zero, so that decisions differ."""
    generator = torch.Generator().manual_seed(11)
    for router in routers(model).values():
        for value in [*router.scorer.parameters(), *router.select.parameters()]:
            with torch.no_grad():
                value.copy_(torch.randn(value.shape, generator=generator) * std)


def routers(model) -> dict[str, Router]:
    return {module.site: module for module in model.modules() if isinstance(module, Router)}
