"""Prompts that `generate` reads in chunks: a decision about a sequence is made on the first chunk, and the user hears of it.

`generate(prefill_chunk_size=n)` calls the model once for n tokens of the prompt. A decision that outlives its pass is
made in the first of these calls and rides on the cache, so tokens of later chunks have no say. No argument of the model
tells such a call from a short prompt, only the function that makes it.
"""

from __future__ import annotations

import functools
import sys
import warnings

import torch
from transformers import GenerationMixin

# no public name: without it no chunk is noticed, and nothing is said
_PREFILL = getattr(getattr(GenerationMixin, "_prefill", None), "__code__", None)


def prefill_chunk_size() -> int | None:
    """Tokens of a chunk, if the model is being called for one of several chunks of a prompt.

    It walks the call stack: once a prompt, not once a token.

    Returns:
        `prefill_chunk_size`; None for a prompt read at one go, outside of `generate`, and in a compiled call.
    """
    if _PREFILL is None or torch.compiler.is_compiling():
        return None
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _PREFILL:
            chunks = frame.f_locals.get("input_chunks", ())
            return chunks[0].shape[-1] if len(chunks) > 1 else None
        frame = frame.f_back
    return None


@functools.cache
def warn_chunks(chunk: int, decisions: str) -> None:
    """Say once that decisions are made on the first chunk of a prompt.

    Args:
        chunk: its tokens.
        decisions: what is decided, for the message.
    """
    warnings.warn(
        f"moe_kit: with prefill_chunk_size={chunk} {decisions} are decided on the first {chunk} tokens of the prompt, "
        "padding included; the rest of it has no say. Leave prefill_chunk_size unset to decide on the whole prompt.",
        stacklevel=2,
    )
