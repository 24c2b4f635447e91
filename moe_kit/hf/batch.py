"""Reads the arguments of a Hugging Face model or of a part of it: which tokens are real, which sequence they belong to,
which are the prompt, and which memory cross-attention reads.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

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


_TOKENS = ("input_ids", "inputs_embeds", "hidden_states", "query_embeds")
_FEATURES = ("input_values", "input_features")
_MEMORY = ("encoder_hidden_states", "cross_attention_states")


def main_context(
    module: nn.Module, arguments: dict[str, Any], inputs: dict[str, Any], prompt_width: int | None = None
) -> RoutingContext:
    """Context of a forward pass; for an encoder-decoder model, of its decoder.

    Args:
        module: the model that is called.
        arguments: its arguments by name.
        inputs: what `routing_inputs` added.
        prompt_width: columns of the prompt that `generate` was called with; what follows it in the first pass are
            candidates of assisted decoding.

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
        if shape is None and _shape(arguments, *_FEATURES) is not None:
            mask_BS = _real(arguments.get("attention_mask"))
        first = 0
        labelled = predicts_next_token(module) and _fits(labels, shape)
    context = RoutingContext(
        mask_BS=mask_BS,
        task_ids_B=inputs.get("task_ids"),
        prior_BE=inputs.get("prior"),
        scalars=inputs.get("scalars", {}),
        shape_BS=None if shape is None else (shape[0], shape[1]),
        **_shortening(module, shape),
    )
    if shape is None:
        return context
    if first == 0 and not _is_plain(arguments.get("attention_mask")):
        packed = _packed(arguments, shape, mask_BS, _pad_id(module))
        context.sequence_BS, context.num_sequences, context.mask_BS = packed
    context.prompt_mask_BS = _prompt(context, inputs, labels if labelled else None, first, shape, arguments)
    if context.prompt_mask_BS is None and not first:
        context.prompt_mask_BS = _generated_from(module, context, prompt_width, shape, arguments)
    return context


def part_context(
    module: nn.Module,
    arguments: dict[str, Any],
    whole: RoutingContext,
    rows_known: bool,
    outer: RoutingContext | None,
) -> RoutingContext:
    """Context of the tokens that a part of a model is called with.

    Args:
        module: the part.
        arguments: its arguments by name.
        whole: context of what is called as a whole.
        rows_known: the part's rows are those of the batch.
        outer: context of the part around it on the same side, if there is one.

    Returns:
        `outer` itself where the part sees as many tokens, as the backbone of a language model does.
    """
    shape = _shape(arguments, *_TOKENS)
    if outer is not None and (shape is None or outer.fits(shape)):
        return outer
    given = arguments.get("attention_mask")
    features = shape is None and _shape(arguments, *_FEATURES) is not None
    grid = next((arguments[name] for name in ("grid_thw", "image_grid_thw") if arguments.get(name) is not None), None)
    return whole.of_tokens(
        None if shape is None or grid is not None else (shape[0], shape[1]),
        _real(given) if features else real_tokens(given, shape),
        rows_known=rows_known,
        lengths=None if grid is None else tuple(grid.prod(-1).tolist()),
        **_shortening(module, shape),
    )


def memory_context(
    arguments: dict[str, Any], whole: RoutingContext, encoded: RoutingContext | None, rows_known: bool
) -> RoutingContext | None:
    """Context of what the cross-attention of a model or of a part reads.

    Args:
        arguments: arguments by name.
        whole: context of what is called as a whole.
        encoded: context of the encoder, if it has run in this pass.
        rows_known: the memory's rows are those of the batch.

    Returns:
        `encoded` where the memory is the encoder's output; None if the call has no memory.
    """
    memory = next((arguments[name] for name in _MEMORY if isinstance(arguments.get(name), Tensor)), None)
    outputs = arguments.get("encoder_outputs")
    if memory is None and outputs is not None:
        memory = outputs[0]
    if memory is None:
        return _read_by_encoder(arguments, whole)
    if memory.dim() != 3:
        return None
    shape = memory.shape[:2]
    if encoded is not None and encoded.fits(shape):
        return encoded
    # an encoder-decoder model calls the mask of its encoder the attention mask
    mask = arguments.get("encoder_attention_mask" if outputs is None else "attention_mask")
    shortened = _is_plain(mask) and mask.shape[1] != shape[1]
    context = whole.of_tokens(
        None if shortened else (shape[0], shape[1]),
        _real(mask) if shortened else real_tokens(mask, shape),
        shortens=shortened,
        rows_known=rows_known,
    )
    return context.fitting(memory)


def _read_by_encoder(arguments: dict[str, Any], whole: RoutingContext) -> RoutingContext | None:
    """Tokens of the encoder in a call of a whole encoder-decoder model, for layers that lie in no part."""
    shape = _shape(arguments, "input_ids", "inputs_embeds")
    if shape is None or all(
        arguments.get(name) is None for name in ("labels", "decoder_input_ids", "decoder_inputs_embeds")
    ):
        return None
    return whole.of_tokens((shape[0], shape[1]), real_tokens(arguments.get("attention_mask"), shape))


def _shortening(module: nn.Module, shape: torch.Size | None) -> dict[str, Any]:
    """Fields of a part that reads sound: its tokens are fewer than the frames that its mask is about."""
    if shape is not None:
        return {}
    return {"shortens": True, "reduce_mask": getattr(module, "_get_feature_vector_attention_mask", None)}


def _real(mask: Any) -> Tensor | None:
    return mask.bool() if _is_plain(mask) else None


def _pad_id(module: nn.Module) -> int | None:
    pad = getattr(getattr(module, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) else None


def _generated_from(
    module: nn.Module,
    context: RoutingContext,
    prompt_width: int | None,
    shape: torch.Size,
    arguments: dict[str, Any],
) -> Tensor | None:
    """The prompt in a pass of `generate` that holds candidates as well, or in a batch padded without a mask."""
    mask_BS = context.mask_BS
    if prompt_width is not None:
        if shape[1] <= prompt_width:
            return None
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        prompt = (torch.arange(shape[1], device=device) < prompt_width).expand(shape)
        return prompt if mask_BS is None else prompt & mask_BS
    ids = arguments.get("input_ids")
    unmasked = mask_BS is None and context.sequence_BS is None and arguments.get("past_key_values") is None
    if torch.is_grad_enabled() or ids is None or not unmasked or shape[1] < 2:
        return None
    # evaluation harnesses pad on the right with id 0, or the padding token, and give no mask: causal outputs do not
    # notice, a decision about the sequence must not either
    last = ids[:, -1:]
    known = (last == 0) | (last == (0 if _pad_id(module) is None else _pad_id(module)))
    padding = (ids == last).flip(1).long().cumprod(1).flip(1).bool() & known
    return torch.where(padding.all(1, keepdim=True), True, ~padding)


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


def _packed(
    arguments: dict[str, Any], shape: torch.Size, mask_BS: Tensor | None, pad_id: int | None
) -> tuple[Tensor | None, int | None, Tensor | None]:
    """`packed_sequences` and the mask, unless positions start anew because a prepared mask hides padding in front."""
    sequence_BS, count, gaps_BS = packed_sequences(arguments, shape, pad_id)
    if sequence_BS is not None and mask_BS is not None and not bool(mask_BS.all()):
        return None, None, mask_BS
    if gaps_BS is None:
        return sequence_BS, count, mask_BS
    return sequence_BS, count, ~gaps_BS if mask_BS is None else mask_BS & ~gaps_BS


def packed_sequences(
    arguments: dict[str, Any], shape: torch.Size, pad_id: int | None = None
) -> tuple[Tensor | None, int | None, Tensor | None]:
    """Documents of packed rows, told from positions that start anew.

    Only without an attention mask, as transformers itself tells packed rows. This reads a number back from the
    device, and only when `position_ids` are given.

    Args:
        arguments: arguments of a model by name.
        shape: [B, S] of the tokens.
        pad_id: the padding token; None = not known.

    Returns:
        (int64 [B, S] numbered over the batch, count, bool [B, S] padding behind the documents or None), or three times
        None if every row is one sequence.
    """
    positions = arguments.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != shape[1] or shape[1] < 2:
        return None, None, None
    positions = positions.expand(shape)
    starts_BS = torch.ones_like(positions, dtype=torch.bool)
    starts_BS[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    gaps_BS = _gaps(starts_BS, arguments.get("input_ids"), pad_id)
    sequence_BS = (starts_BS & ~gaps_BS).flatten().long().cumsum(0).view(shape) - 1
    count, any_gap = torch.stack([sequence_BS[-1, -1] + 1, gaps_BS.any()]).tolist()
    gaps = gaps_BS if any_gap else None
    return (None, None, None) if count == shape[0] and gaps is None else (sequence_BS, count, gaps)


def _gaps(starts_BS: Tensor, ids: Any, pad_id: int | None) -> Tensor:
    """Padding behind the last document (`pad_to_multiple_of`), where each token starts anew: bool [B, S]."""
    alone = starts_BS.flip(1).long().cumprod(1).flip(1).bool()
    # the first token of a row starts a document in any case
    alone[:, 0] = False
    if isinstance(ids, Tensor) and pad_id is not None:
        return alone & (ids == pad_id)
    # one such token may be a document
    return alone & (alone.sum(1, keepdim=True) > 1)


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
