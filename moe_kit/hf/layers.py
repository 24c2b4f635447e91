"""Finds the decoder layers of a Hugging Face model, and the attention and MLP inside each, from the model's structure.

No model class is named: the decoder layers are the elements of the one `ModuleList` that is as long as the text
config says and whose elements each hold a self-attention, which is the direct child that knows its `layer_idx`. The
MLP is the other direct child with matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_kit.errors import ConfigError

# what a decoder layer may keep in a cache and a layer router can handle
_ROUTABLE = ("full_attention", "sliding_attention", "chunked_attention")

# name of the child that a layer router adds to a module; only the containers inside it bear the PEFT prefix
UNIT = "depth_unit"


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model.

    Attributes:
        path: module path of the list, such as "model.layers".
        layers: the layers in execution order.
        kinds: what each keeps in a cache, such as "full_attention" or "sliding_attention".
    """

    path: str
    layers: tuple[nn.Module, ...]
    kinds: tuple[str, ...]

    @property
    def anchors(self) -> tuple[int, ...]:
        """Indices of the first layer and of the first layer of each attention kind.

        transformers sizes the one mask that all layers of a kind share, and the default positions, from the cache of
        these layers, so their caches must hold every token.
        """
        first = {self.kinds.index(kind) for kind in set(self.kinds)}
        return tuple(sorted(first | {0}))

    def layer_path(self, index: int) -> str:
        """Module path of a layer."""
        return f"{self.path}.{index}"


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder of a model.

    Raises:
        ConfigError: if the model has no Hugging Face config.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ConfigError(
            f"{type(model).__name__} has no Hugging Face config: layer routers go on a PreTrainedModel such as "
            "AutoModelForCausalLM gives."
        )
    return config.get_text_config(decoder=True)


def find_decoder_layers(model: nn.Module) -> DecoderLayers:
    """Find the decoder layers.

    Args:
        model: a `PreTrainedModel`, with or without adapters in it.

    Returns:
        The layers in execution order.

    Raises:
        ConfigError: if there is no such list or more than one; the message says what was looked for.
    """
    config = text_config(model)
    length = config.num_hidden_layers
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [(name, list_) for name, list_ in lists if len(list_) == length and all(map(_attention_name, list_))]
    if len(found) != 1:
        seen = ", ".join(f"{name} (length {len(list_)})" for name, list_ in lists) or "no ModuleList at all"
        raise ConfigError(
            f"cannot find the decoder layers of {type(model).__name__}: looked for one ModuleList of "
            f"num_hidden_layers = {length} modules that each have a direct child with a `layer_idx` (a self-attention); "
            f"{len(found)} fit. The model has: {seen}."
        )
    path, layers = found[0]
    kinds = layer_kinds(config)
    unknown = sorted(set(kinds) - set(_ROUTABLE))
    if unknown:
        raise ConfigError(
            f"{type(model).__name__} has layers of kind {', '.join(unknown)}: layer routers know attention layers only "
            f"({', '.join(_ROUTABLE)})."
        )
    return DecoderLayers(path, tuple(layers), kinds)


def layer_kinds(config: Any) -> tuple[str, ...]:
    """What each layer keeps in a cache, as transformers' caches decide it.

    Args:
        config: a text config.

    Returns:
        One kind a layer.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    return tuple(get_layer_types_and_kwargs(config)[0])


def _attention_name(layer: nn.Module) -> str | None:
    """Name of the self-attention of a decoder layer: its first direct child with a `layer_idx`, or None."""
    for name, child in layer.named_children():
        if isinstance(getattr(child, "layer_idx", None), int) and not getattr(child, "is_cross_attention", False):
            return name
    return None


def find_attention(layer: nn.Module) -> str:
    """Name of the self-attention of a decoder layer.

    Raises:
        ConfigError: if no direct child has a `layer_idx`.
    """
    name = _attention_name(layer)
    if name is None:
        raise ConfigError(
            f"cannot find the self-attention of {type(layer).__name__}: looked for a direct child with `layer_idx`, "
            f"found {[child for child, _ in layer.named_children()]}."
        )
    return name


def find_mlp(layer: nn.Module) -> str:
    """Name of the feed-forward block of a decoder layer, dense or mixture of experts.

    Raises:
        ConfigError: if not exactly one direct child besides the attention has matrices.
    """
    attention = find_attention(layer)
    names = [
        name
        for name, child in layer.named_children()
        # a tuner's child is not the model's own
        if name != attention and name != UNIT and any(p.dim() > 1 for p in child.parameters())
    ]
    if len(names) != 1:
        raise ConfigError(
            f"cannot find the MLP of {type(layer).__name__}: looked for the one direct child with matrices besides "
            f"{attention!r}, found {names}. Route whole layers instead: units='layer'."
        )
    return names[0]
