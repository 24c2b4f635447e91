"""Greedy answers in batches.

Prompts of similar length share a batch and are padded on the left, so that every row's last prompt token stands at the
same column and generation starts there. The answers come back in the order of the examples.

Not here: whether an answer is right (`moe_kit.evaluation.scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moe_kit.training.data import Example
from moe_kit.training.encoding import encode_prompt
from moe_kit.training.recipe import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["generate_answers"]


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: DataConfig,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Generate one greedy answer for each example.

    Args:
        model: A causal language model, adapted or not. It is put into eval mode for the duration.
        tokenizer: Its tokenizer, with a chat template and a padding token.
        examples: Prompts; their answers are not looked at.
        config: The data section (system prompt, chat template).
        batch_size: Prompts in one batch.
        max_new_tokens: Longest answer in tokens; generation ends earlier at the end-of-turn token.
        progress: Called with the number of examples just finished.

    Returns:
        Answers without special tokens and surrounding spaces, in the order of `examples`.
    """
    import torch

    prompts = [encode_prompt(example, tokenizer, config) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    answers = [""] * len(examples)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = len(prompts[chosen[-1]])
            ids_BS = torch.full((len(chosen), longest), tokenizer.pad_token_id, dtype=torch.long, device=model.device)
            mask_BS = torch.zeros_like(ids_BS)
            for row, i in enumerate(chosen):
                ids_BS[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask_BS[row, longest - len(prompts[i]) :] = 1
            with torch.no_grad():
                written_BS = model.generate(
                    input_ids=ids_BS,
                    attention_mask=mask_BS,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            for i, text in zip(chosen, tokenizer.batch_decode(written_BS[:, longest:], skip_special_tokens=True)):
                answers[i] = text.strip()
            if progress:
                progress(len(chosen))
    finally:
        model.train(was_training)
    return answers
