"""Which linears may share a router: those that receive the same input.

Groups are named by the last part of a module's path, under one parent. Cross-attention is split, since its query
reads other states than its key and value. Whether two linears really got the same tensor is checked at run time, so
a wrong group costs sharing, never correctness.
"""

from __future__ import annotations

import re

from moe_kit.errors import ConfigError

SHARING = ("none", "input", "block", "model")

_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
_QUERY = {"q_proj", "query_proj", "query", "q", "q_lin", "to_q"}
_CROSS = re.compile(r"cross|enc_?dec|encoder_attn|encdec", re.IGNORECASE)
_BLOCK = re.compile(r"^(.*?\.\d+)(\.|$)")
_MEMORY = {"k", "v", "k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "k_lin", "v_lin", "to_k", "to_v"}


def reads_encoder(path: str) -> bool:
    """Whether a linear of an encoder-decoder model reads the encoder's tokens: encoder layers, cross-attention memory.

    Args:
        path: module path of the linear.

    Returns:
        True for such a linear; in other models the answer means nothing.

    Example:
        >>> reads_encoder("decoder.block.0.layer.1.EncDecAttention.k")
        True
        >>> reads_encoder("decoder.block.0.layer.1.EncDecAttention.q")
        False
    """
    parent = path.rpartition(".")[0]
    return is_memory(path) or (not _CROSS.search(parent) and "encoder" in parent.split("."))


def is_memory(path: str) -> bool:
    """Whether a linear makes keys or values of cross-attention.

    Args:
        path: module path of the linear.
    """
    parent, _, leaf = path.rpartition(".")
    return bool(_CROSS.search(parent)) and leaf in _MEMORY


def router_group(path: str, sharing: str) -> str:
    """Key of the group of linears that share a router.

    Args:
        path: module path of the linear.
        sharing: "none", "input" (same input: q,k,v; gate,up), "block" or "model".

    Returns:
        A key; equal keys share one router.

    Raises:
        ConfigError: if `sharing` is none of the four.

    Example:
        >>> router_group("layers.0.self_attn.k_proj", "input") == router_group("layers.0.self_attn.q_proj", "input")
        True
    """
    if sharing not in SHARING:
        raise ConfigError(f"router_sharing is {sharing!r}, expected one of {', '.join(SHARING)}.")
    # the tokens of encoder and decoder are different decisions
    side = "#encoder" if reads_encoder(path) else ""
    if sharing == "model":
        return "model" + side
    if sharing == "block":
        match = _BLOCK.match(path)
        return match.group(1) + side if match else path
    parent, _, leaf = path.rpartition(".")
    if sharing == "input":
        for index, names in enumerate(_SAME_INPUT):
            if leaf in names:
                side = ".query" if leaf in _QUERY and _CROSS.search(parent) else ""
                return f"{parent}#{index}{side}"
    return path
