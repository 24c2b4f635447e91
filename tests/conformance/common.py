"""What the conformance tests share: small routed models that are awake, and gradients by name."""

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from moe_kit import RoutedAdapterConfig
from tests.tiny import batch_of, tiny_llama, wake_banks

NAME = "skills_a"


def config(preset="mixture_of_lora", **overrides):
    values = dict(num_experts=4, top_k=2, r=3, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    return RoutedAdapterConfig.from_preset(preset, **{**values, **overrides})


def routed(base=None, name=NAME, awake=True, **overrides):
    """A wrapped tiny Llama in evaluation mode; its experts and routers differ from each other."""
    model = get_peft_model(base or tiny_llama().eval(), config(**overrides), adapter_name=name)
    if awake:
        wake(model)
    return model.eval()


def wake(model, seed=11):
    wake_banks(model)
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.named_parameters():
        if "moe_adapter_router" in key:
            with torch.no_grad():
                value.copy_(torch.randn(value.shape, generator=generator))
                if key.endswith("stepper.strength"):
                    # it starts at 1e-4 and stays positive; a large one would drown the loss that is trained
                    value.abs_().mul_(1e-3)


@torch.no_grad()
def take_loras(model, plain):
    """Give mixtures of one expert the weights of LoRAs on the same linears, adapter by adapter."""
    for path, layer in plain.named_modules():
        if isinstance(layer, LoraLayer):
            for name, bank in model.get_submodule(path).moe_adapter_bank.items():
                bank.A[0].copy_(layer.lora_A[name].weight)
                bank.B[0].copy_(layer.lora_B[name].weight)


def gradients(model):
    return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}


class Caught(torch.optim.SGD):
    """Keeps the gradients of every step and moves nothing."""

    def __init__(self, model):
        self.model, self.caught = model, []
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step(self, closure=None):
        self.caught.append(gradients(self.model))


def adapter_state(model, name=NAME):
    return {key: value for key, value in model.state_dict().items() if f".{name}." in key}


def rows(count=8, length=6):
    """A map-style dataset of single examples."""
    batch = batch_of(rows=count, length=length)
    return [{key: value[row] for key, value in batch.items()} for row in range(count)]
