"""Options of PEFT's LoRA that routed adapters do not have, each with its reason and what to do instead.

The reasons are what a user reads who passes such an option, and the rows of `docs/peft_lora.md`.
"""

from __future__ import annotations

REFUSED_OPTIONS: dict[str, str] = {
    "lora_dropout": "it is called dropout here",
    "fan_in_fan_out": "it is read off the layer itself (transformers' Conv1D)",
    "bias": "biases of the base stay frozen; name a module in modules_to_save to train it in full",
    "lora_bias": "experts have no bias of their own; name a module in modules_to_save to train its bias",
    "init_lora_weights": "experts start as LoRA does by default, A uniform and B zero; from_adapters starts from finished LoRAs",
    "loftq_config": "it starts one A and B from the error of one quantised weight, which several experts would start from alike",
    "eva_config": "it starts one A from data, and experts would start alike; from_adapters starts from LoRAs made with it",
    "corda_config": "it changes the base weight by one A and B; from_adapters takes such a LoRA once it was saved as a plain one",
    "lora_ga_config": "it changes the base weight by one A and B; from_adapters takes such a LoRA once it was saved as a plain one",
    "kasa_config": "it changes the base weight, which other adapters of the model share",
    "use_dora": "it normalises the merged matrix, and a mixture that depends on the input has none",
    "runtime_config": "it is about DoRA's norms and is not saved; there is nothing to offload here",
    "use_qalora": "it pools the input by the groups of one quantised weight; plain experts go on quantised linears",
    "qalora_group_size": "it belongs to use_qalora, which routed adapters do not have",
    "use_bdlora": "it splits one A or B into blocks for tensor-parallel serving of a plain LoRA",
    "velora_config": "it compresses what LoRA keeps for the backward pass; here that is the shared input and top_k * r numbers a token",
    "alora_invocation_tokens": "it switches a LoRA on from a token on; a router decides for each token here",
    "monteclora_config": "it samples A; a mixture is sampled by its router (preset remix)",
    "arrow_config": "it routes over finished LoRAs, as from_adapters does with a router that is trained",
    "megatron_config": "Megatron's parallel linears are not adapted",
    "megatron_core": "Megatron's parallel linears are not adapted",
}
