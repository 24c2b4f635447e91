"""`expert_layout` beside the user's own patterns, through a saved configuration."""

import json

from peft import get_peft_model

from moe_kit import RoutedAdapterConfig
from tests.tiny import tiny_llama


def experts_of(model):
    banks = {name: m for name, m in model.named_modules() if name.endswith("moe_adapter_bank.default")}
    return {name.split("layers.")[1].split(".moe")[0]: bank.A.shape[0] for name, bank in banks.items()}


def test_own_patterns_win_also_after_the_keys_were_sorted():
    settings = dict(
        r=4, top_k=1, target_modules=["q_proj", "v_proj"], expert_layout=[2, 3], expert_pattern={"q_proj": 5}
    )
    config = RoutedAdapterConfig.from_preset("mixture_of_lora", **settings, router_sharing="none")
    expected = experts_of(get_peft_model(tiny_llama(layers=2), config))
    assert expected == {
        "0.self_attn.q_proj": 5,
        "0.self_attn.v_proj": 2,
        "1.self_attn.q_proj": 5,
        "1.self_attn.v_proj": 3,
    }
    saved = json.loads(json.dumps(config.expert_pattern, sort_keys=True))
    for pattern in (saved, {key.removesuffix(r"\..*"): value for key, value in saved.items()}):
        again = RoutedAdapterConfig.from_preset(
            "mixture_of_lora", **{**settings, "expert_pattern": pattern}, router_sharing="none"
        )
        assert experts_of(get_peft_model(tiny_llama(layers=2), again)) == expected
