r"""Likelihood evaluation: how much probability the model gives to the right answer.

For an answer y_1 .. y_n after prompt x, the loss is -sum_j log p(y_j | x, y_<j) in nats, the end-of-turn token
included. It moves smoothly where exact match still reads zero, and it needs no generation: one forward pass a batch.

Not here: exact match (`moe_kit.evaluation.scores`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_kit.training.data import Example
from moe_kit.training.encoding import IGNORED, Collator, EncodedExamples
from moe_kit.training.recipe import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Likelihood", "answer_likelihood"]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Loss of the right answers of one task."""

    nats_per_answer: float
    """Mean over examples of the answer's summed negative log-likelihood."""

    stderr: float
    """Standard error of `nats_per_answer`; 0 for a single example."""

    nats_per_token: float
    """Summed loss over summed answer tokens."""

    count: int
    """Number of examples."""


def answer_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: DataConfig,
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Likelihood]:
    """Measure the loss of the right answers by task.

    Args:
        model: A causal language model, adapted or not. It is put into eval mode for the duration.
        tokenizer: Its tokenizer.
        examples: Prompts with answers.
        config: The data section; `too_long` applies, so dropped examples are not counted.
        batch_size: Examples in one forward pass.
        progress: Called with the number of examples just finished.

    Returns:
        Task -> likelihood, in the order in which tasks first appear.
    """
    import torch

    rows = EncodedExamples(examples, tokenizer, config)
    tasks = {example.example_id: example.task for example in examples}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    collate = Collator(pad_token_id=tokenizer.pad_token_id)
    losses: dict[str, list[tuple[float, int]]] = {task: [] for task in dict.fromkeys(tasks.values())}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = collate([rows[i] for i in order[start : start + batch_size]])
            ids = batch.pop("example_ids")
            with torch.no_grad():
                logits_BSV = model(
                    input_ids=batch["input_ids"].to(model.device),
                    attention_mask=batch["attention_mask"].to(model.device),
                    logits_to_keep=batch["logits_to_keep"].to(model.device),
                ).logits
            labels_BS = batch["labels"][:, 1:].to(model.device)
            loss_BS = torch.nn.functional.cross_entropy(
                logits_BSV[:, :-1].float().transpose(1, 2), labels_BS, ignore_index=IGNORED, reduction="none"
            )
            counts_B = (labels_BS != IGNORED).sum(1)
            for name, loss, count in zip(ids, loss_BS.double().sum(1).tolist(), counts_B.tolist()):
                losses[tasks[name]].append((loss, count))
            if progress:
                progress(len(ids))
    finally:
        model.train(was_training)
    return {task: _likelihood(pairs) for task, pairs in losses.items() if pairs}


def _likelihood(pairs: Sequence[tuple[float, int]]) -> Likelihood:
    """Average (loss, tokens) pairs."""
    n = len(pairs)
    mean = sum(loss for loss, _ in pairs) / n
    variance = sum((loss - mean) ** 2 for loss, _ in pairs) / (n - 1) if n > 1 else 0.0
    return Likelihood(
        nats_per_answer=mean,
        stderr=math.sqrt(variance / n),
        nats_per_token=sum(loss for loss, _ in pairs) / sum(tokens for _, tokens in pairs),
        count=n,
    )
