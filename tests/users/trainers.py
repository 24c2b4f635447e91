"""What the trainer tests share: models, trainers of TRL, and the gradient of the auxiliary losses alone."""

import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from moe_kit.routing import weighted_routing_loss
from tests.conformance.common import Caught, config, gradients, wake
from tests.tiny import MOE_FAMILIES, tiny_llama, words_tokenizer

# large, so that the part of the auxiliary loss is no small difference of two float32 gradients
COEFFICIENT = 8.0
QUIET = dict(report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, logging_steps=1)
ONE_STEP = dict(QUIET, max_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant", gradient_checkpointing=False)


_GROUPED = dict(moe_intermediate_size=16, head_dim=8, n_group=1, topk_group=1)
_ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
# bases whose configuration can ask for router logits and names no coefficient: the linear to adapt, and their sizes
NO_COEFFICIENT = {
    "DeepseekV3": ("o_proj", MOE_FAMILIES["DeepseekV3"]),
    "DeepseekV2": ("o_proj", dict(MOE_FAMILIES["DeepseekV3"], topk_method="greedy", n_group=1)),
    "Glm4MoeLite": ("o_proj", MOE_FAMILIES["DeepseekV3"]),
    "Glm4Moe": ("o_proj", dict(_ROUTED, **_GROUPED, first_k_dense_replace=1)),
    "Dots1": ("o_proj", dict(_ROUTED, **_GROUPED, first_k_dense_replace=1, n_shared_experts=1)),
    "SolarOpen": ("o_proj", dict(_ROUTED, **_GROUPED)),
    "Lfm2Moe": ("out_proj", dict(_EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention"])),
    "JetMoe": ("kv_proj", dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=8)),
    "Afmoe": ("o_proj", dict(_EXPERTS, num_dense_layers=1, head_dim=8)),
    "ExaoneMoe": ("o_proj", dict(_EXPERTS, head_dim=8, first_k_dense_replace=1)),
    "HunYuanMoEV1": ("o_proj", dict(num_experts=4, moe_topk=2, head_dim=8)),
    "Cohere2Moe": ("o_proj", dict(num_experts=4, num_experts_per_tok=2, head_dim=8)),
}


def base_without_coefficient(family: str) -> PreTrainedModel:
    """A random model of one of `NO_COEFFICIENT`."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **NO_COEFFICIENT[family][1]})
    assert config.output_router_logits is False
    assert not hasattr(config, "router_aux_loss_coef")
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    return model


def tiny_classifier(layers=2):
    """A random Llama that scores a text."""
    torch.manual_seed(1)
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=layers)
    return LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, pad_token_id=0, initializer_range=0.3))


def routed_model(base=None, preset="mixture_of_lora", **overrides):
    """A wrapped base in training mode, awake; TRL looks for an adapter named default."""
    base = tiny_llama() if base is None else base
    torch.manual_seed(5)
    model = get_peft_model(base, config(preset, **overrides))
    wake(model)
    return model.train()


TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [2, 3, 4], [15, 16, 17]]


def preferences():
    """Four prompts with a better and a worse answer."""
    return [{"prompt": f"w{2 + i} w3", "chosen": "w4 w5 w9", "rejected": "w6 w7"} for i in range(4)]


def distinct_words(completions, **kwargs):
    """A reward for each completion."""
    return [float(len(set(text.split()))) for text in completions]


def trl_trainer(name, model, folder, data=None, options=None, **overrides):
    """A trainer of TRL by its short name, with tiny data; `options` are arguments of the trainer itself."""
    import trl

    judged = [{"prompt": f"w{2 + i} w3", "completion": f"w{4 + i} w5", "label": i % 2 == 0} for i in range(4)]
    ranked = [{"chosen": f"w{2 + i} w4 w5 w9", "rejected": f"w{2 + i} w6 w7"} for i in range(4)]
    prompts = [{"prompt": f"w{2 + i} w4"} for i in range(4)]
    texts = [{"input_ids": text} for text in TEXTS]
    datasets = {"SFT": texts, "DPO": preferences(), "KTO": judged, "GRPO": prompts, "RLOO": prompts, "Reward": ranked}
    values = dict(QUIET, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, gradient_checkpointing=False)
    values |= dict(lr_scheduler_type="constant")
    options = options or {}
    if name in ("GRPO", "RLOO"):
        values |= dict(num_generations=4, max_completion_length=5, beta=0.1)
        options = dict(reward_funcs=distinct_words, **options)
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(str(folder), **{**values, **overrides}),
        train_dataset=Dataset.from_list(datasets[name]) if data is None else data,
        processing_class=words_tokenizer(),
        **options,
    )


def catch(train, build, losses, **options):
    """Gradients of one step, the inputs of its training passes, and the trainer.

    `train(model, optimizer, **options)` runs a trainer and returns it; `build(losses)` makes its model.
    """
    model, passes = build(losses), []

    def note(module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            passes.append({k: kwargs[k] for k in ("input_ids", "attention_mask", "position_ids") if k in kwargs})

    model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    optimizer = Caught(model)
    trainer = train(model, optimizer, **options)
    (found,) = optimizer.caught
    return found, passes, trainer


def auxiliary_part(train, build, losses, without=None, **options):
    """Gradient that the auxiliary losses alone give, and what it should be: by key, for every trained parameter.

    Several passes of a step count as their mean.
    """
    found, passes, _ = catch(train, build, losses, **options)
    bare, _, _ = catch(train, build, without or {}, **options)
    part = {key: value - bare.get(key, torch.zeros_like(value)) for key, value in found.items()}
    model = build(losses)
    for inputs in passes:
        model(**inputs)
        (weighted_routing_loss(model) / len(passes)).backward()
    wanted = gradients(model)
    return part, {key: wanted.get(key, torch.zeros_like(value)) for key, value in part.items()}


def assert_delivered(part, wanted, tolerance=2e-4):
    """The two are equal, and not zero."""
    scale = max(value.abs().max() for value in wanted.values())
    assert scale > 1e-4, "the test's own loss has no gradient"
    for key, value in wanted.items():
        error = (part[key] - value).abs().max()
        assert error <= tolerance * scale, f"{key}: off by {error:.1e}, largest gradient {scale:.1e}"
