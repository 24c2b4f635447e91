"""Reads a Hugging Face model's arguments: which tokens are real, which sequence they belong to, which are the prompt.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.hf.checks import fitting_prompt
from moe_kit.routing.context import RoutingContext

IGNORED_LABEL = -100


def shifts_labels(module: nn.Module) -> bool:
    """Whether the Trainer counts labels from the second on, since position s of the model predicts label s + 1.

    It is what `num_items_in_batch` goes by, so a share of it must be told the same way, also where the Trainer is wrong
    (it does not know GPT-2's loss).

    Args:
        module: the inner model.

    Returns:
        True for most causal language models; False for encoder-decoders, classification and masked language models.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return False
    return LOSS_MAPPING.get(getattr(module, "loss_type", None)) is ForCausalLMLoss


def predicts_next_token(module: nn.Module) -> bool:
    """Whether labels of a model are answers that its earlier tokens lead to.

    Args:
        module: the inner model.

    Returns:
        True for causal language models, those with an older kind of class name included.
    """
    name = type(module).__name__
    return shifts_labels(module) or (name.endswith("LMHeadModel") and not name.endswith("WithLMHeadModel"))


def main_context(module: nn.Module, arguments: dict[str, Any], inputs: dict[str, Any]) -> RoutingContext:
    """Context of a forward pass; for an encoder-decoder model, of its decoder.

    Args:
        module: the model that is called.
        arguments: its arguments by name.
        inputs: what `routing_inputs` added.

    Returns:
        A fresh, open context.
    """
    labels = arguments.get("labels")
    if _has_decoder_inputs(module, arguments):
        shape = _shape(arguments, "decoder_input_ids", "decoder_inputs_embeds")
        # the decoder's inputs are the labels shifted right
        shape = labels.shape[:2] if shape is None and isinstance(labels, Tensor) and labels.dim() == 2 else shape
        mask_BS = real_tokens(arguments.get("decoder_attention_mask"), shape)
        if mask_BS is None and shape is not None and _fits(labels, shape):
            mask_BS = labels != IGNORED_LABEL
        first = 1
        labelled = _fits(labels, shape)
    else:
        shape = _shape(arguments, "input_ids", "inputs_embeds")
        mask_BS = real_tokens(arguments.get("attention_mask"), shape, arguments.get("past_key_values"))
        first = 0
        labelled = predicts_next_token(module) and _fits(labels, shape)
    context = RoutingContext(
        mask_BS=mask_BS,
        task_ids_B=inputs.get("task_ids"),
        prior_BE=inputs.get("prior"),
        scalars=inputs.get("scalars", {}),
        shape_BS=None if shape is None else (int(shape[0]), int(shape[1])),
    )
    if shape is None:
        return context
    if first == 0 and not _is_plain(arguments.get("attention_mask")):
        context.sequence_BS, context.num_sequences = _packed(arguments, shape, mask_BS)
    context.prompt_mask_BS = _prompt(context, inputs, labels if labelled else None, first, shape, arguments)
    return context


def encoder_context(context: RoutingContext, arguments: dict[str, Any]) -> RoutingContext | None:
    """Context of the encoder's tokens, which has a mask of its own and shares all records of the pass.

    Args:
        context: context of the decoder.
        arguments: arguments of an encoder-decoder model by name.

    Returns:
        The context, or None if the model was called without anything for its encoder.
    """
    shape = _shape(arguments, "input_ids", "inputs_embeds", "input_features")
    if shape is None and arguments.get("encoder_outputs") is not None:
        shape = arguments["encoder_outputs"][0].shape[:2]
    if shape is None:
        return None
    return dataclasses.replace(
        context,
        mask_BS=real_tokens(arguments.get("attention_mask"), shape),
        prompt_mask_BS=None,
        sequence_BS=None,
        num_sequences=None,
        shape_BS=(int(shape[0]), int(shape[1])),
    )


def real_tokens(attention_mask: Any, shape: torch.Size | None, cache: Any = None) -> Tensor | None:
    """Real tokens of this pass: the last columns of a two-dimensional mask, the diagonal of a prepared one.

    `generate` prepares masks itself when a cache is static. Of a single token nothing is read from a prepared mask,
    which would wait for the device at every decoding step.

    Args:
        attention_mask: [B, S'] with S' >= S when there is a cache; or [B or 1, 1, S, K], or a dict of such masks by
            kind of layer; any other form tells nothing about padding.
        shape: [B, S] of the tokens.
        cache: what holds the keys before these tokens, if anything does.

    Returns:
        bool [B, S], or None if nothing is known to be padding.
    """
    if attention_mask is None or shape is None:
        return None
    batch, length = shape
    if _is_plain(attention_mask):
        columns = attention_mask.shape[1]
        return None if columns < length else attention_mask[:, columns - length :].bool()
    if length == 1:
        return None
    from moe_kit.hf.cache import mask_diagonal

    past = 0 if cache is None else int(cache.get_seq_length())
    return mask_diagonal(attention_mask, (batch, length), past)


def _is_plain(attention_mask: Any) -> bool:
    """Whether a mask is two-dimensional: one entry a token."""
    return isinstance(attention_mask, Tensor) and attention_mask.dim() == 2


def _packed(arguments: dict[str, Any], shape: torch.Size, mask_BS: Tensor | None) -> tuple[Tensor | None, int | None]:
    """`packed_sequences`, unless positions start anew because a prepared mask hides padding before the prompt."""
    found = packed_sequences(arguments, shape)
    if found[0] is not None and mask_BS is not None and not bool(mask_BS.all()):
        return None, None
    return found


def packed_sequences(arguments: dict[str, Any], shape: torch.Size) -> tuple[Tensor | None, int | None]:
    """Documents of packed rows, told from positions that start anew.

    Only without an attention mask, as transformers itself tells packed rows. This reads one number back from the
    device, and only when `position_ids` are given.

    Args:
        arguments: arguments of a model by name.
        shape: [B, S] of the tokens.

    Returns:
        (int64 [B, S] numbered over the batch, count), or (None, None) if every row is one sequence.
    """
    positions = arguments.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != shape[1] or shape[1] < 2:
        return None, None
    positions = positions.expand(shape)
    starts_BS = torch.ones_like(positions, dtype=torch.bool)
    starts_BS[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    sequence_BS = starts_BS.flatten().long().cumsum(0).view(shape) - 1
    count = int(sequence_BS[-1, -1]) + 1
    return (None, None) if count == shape[0] else (sequence_BS, count)


def _prompt(
    context: RoutingContext,
    inputs: dict[str, Any],
    labels: Tensor | None,
    first: int,
    shape: torch.Size,
    arguments: dict[str, Any],
) -> Tensor | None:
    """Tokens that a sequence-scope decision may read: given ones, else those before the first label, else all real."""
    mask_BS = context.mask_BS
    given = inputs.get("prompt_mask")
    prompt = None if given is None else fitting_prompt(given, shape, arguments)
    if prompt is not None:
        return prompt if mask_BS is None else prompt & mask_BS
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    length = inputs.get("prompt_length")
    if length is not None:
        length_B1 = torch.as_tensor(length, device=device).reshape(-1, 1)
        if length_B1.shape[0] != 1:
            length_B1 = context.rows(length_B1, int(shape[0]), "prompt_length")
        # a prompt is counted in real tokens, so left padding shifts it
        real = torch.ones(shape, dtype=torch.long, device=device) if mask_BS is None else mask_BS.long()
        prompt = (_within_sequence(real, context) <= length_B1).expand(shape)
    elif labels is not None:
        # a decoder's token `first` places further on is already an answer
        seen = _within_sequence((labels != IGNORED_LABEL).long(), context)
        prompt = seen <= first if first else seen == 0
    else:
        return None
    prompt = prompt if mask_BS is None else prompt & mask_BS
    real = torch.ones_like(prompt) if mask_BS is None else mask_BS
    # a sequence whose labels start at its first token has no prompt of its own: it reads all its real tokens
    return torch.where(_any_in_sequence(prompt, context), prompt, real)


def _within_sequence(value_BS: Tensor, context: RoutingContext) -> Tensor:
    """Running sum that starts anew with each packed document."""
    total = value_BS.cumsum(1)
    if context.sequence_BS is None:
        return total
    before = total - value_BS
    starts = torch.ones_like(context.sequence_BS, dtype=torch.bool)
    starts[:, 1:] = context.sequence_BS[:, 1:] != context.sequence_BS[:, :-1]
    return total - torch.where(starts, before, 0).cummax(1).values


def _any_in_sequence(value_BS: Tensor, context: RoutingContext) -> Tensor:
    if context.sequence_BS is None:
        return value_BS.any(1, keepdim=True)
    counts = value_BS.new_zeros(context.num_sequences, dtype=torch.long)
    counts = counts.index_add(0, context.sequence_BS.flatten(), value_BS.flatten().long())
    return counts[context.sequence_BS] > 0


def _shape(arguments: dict[str, Any], *names: str) -> torch.Size | None:
    for name in names:
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return value.shape[:2]
    return None


def _fits(labels: Any, shape: torch.Size | None) -> bool:
    return (
        isinstance(labels, Tensor) and labels.dim() == 2 and shape is not None and tuple(labels.shape) == tuple(shape)
    )


def _has_decoder_inputs(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether this is a whole encoder-decoder model; its encoder alone may share its configuration."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return False
    names = ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs", "labels")
    return any(arguments.get(name) is not None for name in names)
