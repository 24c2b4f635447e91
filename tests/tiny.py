"""Tiny random models and batches for tests; nothing is downloaded."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

# family -> what its tiny configuration has beside the sizes that all share
MOE_FAMILIES = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True),
    "Olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "DeepseekV3": dict(
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
    ),
    # stored [E, in, out], with biases, gate and up interleaved
    "GptOss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=16),
}


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


def tiny_moe_config(family: str, **overrides) -> PretrainedConfig:
    """Configuration of a tiny mixture-of-experts model of one of `MOE_FAMILIES`."""
    shared = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return getattr(transformers, f"{family}Config")(**{**shared, **MOE_FAMILIES[family], **overrides})


def tiny_moe(family: str, **overrides) -> PreTrainedModel:
    """A random mixture-of-experts model of one of `MOE_FAMILIES`."""
    config = tiny_moe_config(family, **overrides)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # the default initialisation leaves biases and routers near zero, where a mix-up would not show
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model


def quiet_arguments(folder, **overrides) -> TrainingArguments:
    """Arguments of a trainer on the CPU that reports and saves nothing."""
    values = dict(report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    return TrainingArguments(str(folder), **{**values, **overrides})


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w2, w3, ..., w60, one token each."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 61)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w60"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="w60")


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
