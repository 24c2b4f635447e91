"""From examples to padded batches: chat template, labels on the answer only, truncation, padding.

    input = template(prompt) + answer + end of turn        label = -100 on the prompt, the token itself after it

Rows are padded on the **left**. Attention and rotary positions are relative, so nothing changes for the model, and all
answers end at the same column: the output head, a fifth of a 135M model's work, then runs on the last few columns only
(`logits_to_keep`), with labels cut to the same columns.

Truncation never touches the answer: a prompt that is too long loses its beginning, and an answer that does not fit
raises.

Not here: where examples come from (`data`), and metrics (`moe_kit.evaluation`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_kit.errors import ConfigError
from moe_kit.training.data import Example
from moe_kit.training.recipe import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Collator", "EncodedExamples", "encode_answer", "encode_example", "encode_prompt"]

logger = logging.getLogger(__name__)

# the label that transformers' losses skip
IGNORED = -100


class EncodedExamples(Sequence[dict[str, Any]]):
    """Encoded examples as a map-style dataset: `input_ids`, `labels` and `example_id`.

    Args:
        examples: What to encode.
        tokenizer: Tokenizer with a chat template.
        config: The data section (system prompt, template, length, truncation).

    Raises:
        ConfigError: Nothing is left, or an example does not fit under `too_long: error`.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig):
        self._rows: list[dict[str, Any]] = []
        dropped = cut = 0
        for example in examples:
            row = encode_example(example, tokenizer, config)
            if row is None:
                dropped += 1
            else:
                cut += row.pop("cut")
                self._rows.append(row)
        if dropped:
            logger.warning(
                "%d of %d examples are longer than %d tokens: dropped", dropped, len(examples), config.max_length
            )
        if cut:
            logger.warning(
                "%d of %d prompts lost their beginning to fit %d tokens", cut, len(examples), config.max_length
            )
        if not self._rows:
            raise ConfigError(
                f"all {len(examples)} examples are longer than data.max_length = {config.max_length} tokens"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads rows on the left and keeps the answers' columns for the head.

    Example:
        >>> rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "example_id": "a"},
        ...         {"input_ids": [8, 9], "labels": [-100, 9], "example_id": "b"}]
        >>> batch = Collator(pad_token_id=0)(rows)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["logits_to_keep"].tolist()
        ([[5, 6, 7], [0, 8, 9]], [[-100, 6, 7], [-100, -100, 9]], [0, 1, 2])
    """

    pad_token_id: int
    """Token that fills short rows; the attention mask hides it."""

    answer_logits_only: bool = True
    """Compute logits where a label needs them. False gives labels of the input's full shape."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows into one batch.

        Args:
            rows: Each with `input_ids`, `labels` (same length) and `example_id`.

        Returns:
            `input_ids` and `attention_mask` [B, S], `labels` [B, S or the kept columns], `example_ids` (list of B
            strings), and `logits_to_keep` (the kept columns' indices) when the head runs on the last columns only.
        """
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        ids_BS = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.long)
        labels_BS = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
        mask_BS = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            start = longest - len(row["input_ids"])
            ids_BS[i, start:] = torch.tensor(row["input_ids"])
            labels_BS[i, start:] = torch.tensor(row["labels"])
            mask_BS[i, start:] = 1
        batch: dict[str, Any] = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}
        if self.answer_logits_only:
            # the loss shifts labels by one: the column before the first label predicts it and must be kept
            labelled = int((labels_BS != IGNORED).any(0).int().argmax())
            keep = longest - max(labelled - 1, 0)
            batch["labels"] = labels_BS[:, -keep:]
            # as indices, not as a number: the model then copies these columns into one block and multiplies it by the
            # head once; a slice of columns is not contiguous, and is multiplied row by row
            batch["logits_to_keep"] = torch.arange(longest - keep, longest)
        batch["example_ids"] = [row["example_id"] for row in rows]
        return batch


def encode_example(example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> dict[str, Any] | None:
    """Encode one example with labels on its answer only.

    Args:
        example: Prompt and answer.
        tokenizer: Tokenizer with a chat template.
        config: The data section.

    Returns:
        `input_ids` and `labels` (lists of equal length), `example_id`, and `cut`, whether the prompt lost tokens. None
        when the example is too long and `too_long` is `drop`.

    Raises:
        ConfigError: The answer alone does not fit into `max_length` tokens (with one token of prompt before it), or the
            example does not fit and `too_long` is `error`.
    """
    prompt = encode_prompt(example, tokenizer, config)
    answer = encode_answer(example, tokenizer, config)
    room = config.max_length - len(answer)
    cut = len(prompt) > room
    if cut:
        size = f"{len(prompt)} tokens of prompt and {len(answer)} of answer, data.max_length is {config.max_length}"
        if config.too_long == "drop":
            return None
        if config.too_long == "error" or room < 1:
            raise ConfigError(
                f"{example.example_id} is too long: {size}. Raise data.max_length or set data.too_long: drop"
            )
        prompt = prompt[len(prompt) - room :]
    return {
        "input_ids": prompt + answer,
        "labels": [IGNORED] * len(prompt) + answer,
        "example_id": example.example_id,
        "cut": cut,
    }


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[int]:
    """Encode the prompt up to where the assistant starts to write.

    Args:
        example: Its `messages` are used; `config.system_prompt`, if given, is put before them.
        tokenizer: Tokenizer with a chat template.
        config: The data section.

    Returns:
        Token ids.
    """
    text = _render(_messages(example, config), tokenizer, config, generation=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_answer(example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[int]:
    """Encode the answer with the end-of-turn token that the template puts after it.

    Args:
        example: Prompt and answer.
        tokenizer: Tokenizer with a chat template.
        config: The data section.

    Returns:
        Token ids, the last of which ends generation.
    """
    messages = _messages(example, config)
    prompt = _render(messages, tokenizer, config, generation=True)
    whole = _render([*messages, {"role": "assistant", "content": example.answer}], tokenizer, config, generation=False)
    # some templates rewrite an assistant turn (they strip thinking); then the plain answer is all that is known
    text = whole[len(prompt) :] if whole.startswith(prompt) else example.answer
    end = tokenizer.eos_token
    if end in text:
        # what a template puts after the end of the turn is never generated: no reason to learn it
        text = text[: text.rindex(end) + len(end)]
    else:
        text = text.rstrip("\n") + end
    return tokenizer(text, add_special_tokens=False).input_ids


def _messages(example: Example, config: DataConfig) -> list[dict[str, str]]:
    """Return the prompt's messages with the recipe's system prompt, unless the example brings its own."""
    messages = list(example.messages)
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    return messages


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, generation: bool
) -> str:
    """Render messages with the recipe's chat template, else the tokenizer's."""
    template = config.chat_template or tokenizer.chat_template
    if template is None:
        raise ConfigError("the tokenizer has no chat template: give one as data.chat_template")
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=generation, tokenize=False
    )
    assert isinstance(text, str), "one conversation, not tokenized, renders to one string"
    return text
