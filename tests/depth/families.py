"""Tiny random models of the supported families."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB, LAYERS = 64, 5
_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    # random weights near 1 make the layers matter
    initializer_range=0.3,
)
_MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]

CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=6, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=8, sliding_window=6, layer_types=_MIXED, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES, head_dim=8, sliding_window=6, layer_types=_MIXED, query_pre_attn_scalar=8
    ),
    "phi3": lambda: Phi3Config(**_SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=2
    ),
}
FAMILIES = tuple(CONFIGS)


def tiny(family: str = "llama", attention: str = "sdpa", seed: int = 0):
    """A tiny random model in evaluation mode."""
    torch.manual_seed(seed)
    if family == "gemma2":
        attention = "eager"  # its soft-capped logits have no sdpa form
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention)
    return model.eval()


def padded_batch(lengths=(9, 5), seed: int = 1, side: str = "left"):
    """Token ids [B, S] and mask of prompts of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, columns] = torch.randint(2, VOCAB, (length,), generator=generator)
        mask[row, columns] = 1
    return dict(input_ids=ids, attention_mask=mask)
