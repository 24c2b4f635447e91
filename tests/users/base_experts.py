"""A tiny mixture-of-experts base with an awake LoRA on each of its experts, PEFT's own or ours."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moe_kit import RoutedAdapterConfig
from tests.tiny import tiny_moe

STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(kind: str = "routed", family: str = "Qwen3Moe", **overrides) -> PeftModel:
    torch.manual_seed(0)
    if kind == "lora":
        config = LoraConfig(r=3, target_modules=[], target_parameters=["mlp." + name for name in STACKS])
    else:
        config = RoutedAdapterConfig.from_preset("mixture_of_lora", r=3, target_parameters=STACKS, **overrides)
    model = get_peft_model(tiny_moe(family), config)
    for name, value in model.named_parameters():
        if name.endswith(".B") or "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    return model.eval()
