"""Tiny random models and batches for tests; nothing is downloaded."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(layers: int = 2, width: int = 16, **overrides) -> LlamaForCausalLM:
    """A random Llama of a few thousand parameters."""
    torch.manual_seed(1)
    values = dict(
        vocab_size=61,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        # wide enough that every part of the model matters
        initializer_range=0.3,
    )
    return LlamaForCausalLM(LlamaConfig(**{**values, **overrides}))


def wake_banks(model: torch.nn.Module, std: float = 0.3) -> None:
    """Give every B a random value, so that experts differ."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "moe_adapter_bank" in name and name.endswith(".B"):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def batch_of(rows: int = 2, length: int = 6, vocabulary: int = 61) -> dict[str, torch.Tensor]:
    """Token ids, a full mask and labels."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
