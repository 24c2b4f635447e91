"""State that rides on a Hugging Face cache: decisions made on the prompt, and slots for layers that run twice.

A decision for a sequence is made once and obeyed while decoding. Kept as one more object in `cache.layers`, it is
reordered by beam search, repeated for returned sequences, selected with the batch, reset with the cache, and carried
through chunked prefill and assisted decoding, by transformers' own code and for free.

Shapes: B batch rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from moe_kit.errors import RoutingError


class CarriedDecisions(DummyLayer):
    """A cache layer that holds no keys but decisions of named sites, rows in dimension 0.

    It counts as a dummy layer, so masks and lengths never look at it.

    Attributes:
        sites: site name -> tensor [B, ...].
        slots: layer index -> index in `cache.layers` of the cache of that layer's second pass.
        notes: what a reader derived from the tensors; dropped whenever rows change, and not copied.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Tensor] = {}
        self.slots: dict[int, int] = {}
        self.notes: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "notes": {}}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.sites = {site: function(value) for site, value in self.sites.items()}
        self.notes = {}

    def reset(self) -> None:
        """Forget every decision; the next prompt decides anew."""
        self.sites, self.notes = {}, {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search."""
        self._map(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Follow returned sequences."""
        self._map(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Follow a selection of rows."""
        self._map(lambda value: value[indices.to(value.device)])


def find_carrier(cache: Any) -> CarriedDecisions | None:
    """The carrier of a cache, or None."""
    for layer in reversed(getattr(cache, "layers", ())):
        if isinstance(layer, CarriedDecisions):
            return layer
    return None


def ensure_carrier(cache: Cache, num_layers: int) -> CarriedDecisions:
    """The carrier of a cache; one is appended if there is none.

    Args:
        cache: any transformers cache with a list of layers.
        num_layers: decoder layers of the model: the cache of a lazily filled cache is extended to them first.

    Raises:
        RoutingError: if the cache keeps no list of layers (encoder-decoder caches).
    """
    carrier = find_carrier(cache)
    if carrier is not None:
        return carrier
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise RoutingError(
            f"decisions cannot ride on a {type(cache).__name__}: expected a transformers Cache with a list of layers, "
            "such as DynamicCache or StaticCache."
        )
    # a lazy cache appends layers as they are first used, and ours must not take a layer's place
    while cache.layer_class_to_replicate is not None and len(layers) < num_layers:
        layers.append(cache.layer_class_to_replicate())
    carrier = CarriedDecisions()
    layers.append(carrier)
    return carrier


def carried(cache: Any) -> Mapping[str, Tensor] | None:
    """Decisions that ride on a cache.

    Args:
        cache: `past_key_values` of a forward call, may be None.

    Returns:
        site name -> tensor [B, ...], in the cache's present row order; None without a cache or before any decision.
        To be read, not written: use `carry`.
    """
    carrier = find_carrier(cache)
    return None if carrier is None else carrier.sites


def carry(cache: Cache, site: str, value: Tensor, num_layers: int | None = None) -> None:
    """Let a decision ride on a cache.

    Args:
        cache: the cache of this request.
        site: name of the router; unique in the model.
        value: tensor [B, ...], one entry a batch row.
        num_layers: decoder layers of the model; needed only for a cache that is still empty and grows lazily
            (`DynamicCache()` without a config), which refuses to guess.

    Raises:
        RoutingError: if the cache cannot hold it.

    Example:
        >>> import torch
        >>> from transformers import DynamicCache
        >>> cache = DynamicCache()
        >>> carry(cache, "router", torch.tensor([2, 5]), num_layers=2)
        >>> cache.reorder_cache(torch.tensor([1, 1]))
        >>> carried(cache)["router"].tolist()
        [5, 5]
    """
    if num_layers is None and find_carrier(cache) is None:
        lazy = getattr(cache, "layer_class_to_replicate", None) is not None
        if lazy and cache.get_seq_length() == 0:
            raise RoutingError(
                "carry() on an empty lazy cache needs num_layers: how many decoder layers the model has."
            )
        num_layers = 0
    carrier = ensure_carrier(cache, num_layers or 0)
    carrier.sites[site] = value.detach()
    carrier.notes = {}


def mask_diagonal(attention_mask: Any, shape: tuple[int, int], past: int) -> Tensor | None:
    """Real tokens of a pass, read from a prepared causal mask: a token sees itself unless it is padding.

    `generate` prepares such masks itself when a cache is static.

    Args:
        attention_mask: [B or 1, 1, S, K], bool (True = seen) or float (0 = seen), or a dict of such masks by layer kind.
        shape: (B, S) of the tokens.
        past: tokens in the cache before this pass.

    Returns:
        bool [B, S], or None if the mask has another form.
    """
    if isinstance(attention_mask, dict):
        # a full mask starts at the first key; a sliding one only while nothing has left its window
        masks = [attention_mask.get(kind) for kind in ("full_attention", "sliding_attention")]
        attention_mask = next((mask for mask in masks if mask is not None), None)
    batch, length = shape
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4 or attention_mask.shape[2] != length:
        return None
    if attention_mask.shape[3] < past + length:
        return None
    diagonal_BS = attention_mask[:, 0].diagonal(offset=past, dim1=1, dim2=2)[:, :length]
    seen_BS = diagonal_BS if diagonal_BS.dtype == torch.bool else diagonal_BS == 0
    return seen_BS.expand(batch, length)


def second_slot(cache: Cache, carrier: CarriedDecisions, layer_idx: int) -> int:
    """Index in `cache.layers` of the cache of a layer's second pass; a fresh one is appended if there is none.

    Args:
        cache: the cache.
        carrier: its carrier.
        layer_idx: index of the layer.

    Returns:
        Index of the slot.
    """
    slot = carrier.slots.get(layer_idx)
    if slot is None:
        slot = carrier.slots[layer_idx] = len(cache.layers)
        cache.layers.append(_fresh(cache.layers[layer_idx]))
    return slot


def _fresh(layer: Any) -> Any:
    """An empty cache layer with the settings of another."""
    fresh = copy.copy(layer)
    if layer.is_initialized:
        # tensors of the other layer must be neither shared nor zeroed
        fresh.keys = fresh.values = None
        fresh.is_initialized = False
    for name, value in vars(layer).items():
        if name.startswith("cumulative_length"):
            setattr(fresh, name, torch.zeros_like(value) if isinstance(value, Tensor) else 0)
    known = isinstance(fresh, DynamicSlidingWindowLayer) or type(fresh).update is DynamicLayer.update
    if not known and not isinstance(fresh, StaticLayer):
        raise RoutingError(
            f"a repeated layer needs a second cache slot, which moe_kit cannot make for {type(layer).__name__}: use a "
            "DynamicCache or a StaticCache."
        )
    return fresh


def mark_empty(layer: Any) -> None:
    """Let an unused sliding-window layer survive `crop`, which reads the shape of its keys even before first use."""
    if isinstance(layer, DynamicSlidingWindowLayer) and not layer.is_initialized and layer.keys is None:
        layer.keys = torch.zeros(1, 1, 0, 1)
        layer.values = torch.zeros(1, 1, 0, 1)


class CacheView:
    """What a routed module sees instead of its cache: the same cache, with another slot or fewer rows.

    Args:
        cache: the cache.
        slot: layer index to write to; None = the module's own.
        rows_N: int64 [N], batch rows that run; the others get zero keys, which nobody reads, so that every row of a
            layer's cache has the same length. None = all rows.
        batch: rows of the whole batch.
    """

    def __init__(self, cache: Cache, slot: int | None = None, rows_N: Tensor | None = None, batch: int = 0) -> None:
        self.cache, self.slot, self.rows_N, self.batch = cache, slot, rows_N, batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values, and return all that the running rows may read."""
        index = layer_idx if self.slot is None else self.slot
        if self.rows_N is None:
            return self.cache.update(keys, values, index, *args, **kwargs)
        spread = []
        for value in (keys, values):
            full = value.new_zeros((self.batch, *value.shape[1:]))
            spread.append(full.index_copy(0, self.rows_N, value))
        keys, values = self.cache.update(*spread, index, *args, **kwargs)
        return keys.index_select(0, self.rows_N), values.index_select(0, self.rows_N)


class KeysWritten(Exception):
    """Raised by `KeysOnly` to leave an attention right after its keys and values are in the cache."""


class KeysOnly(CacheView):
    """A cache view for tokens that skip an attention but must remain visible to later tokens."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values, then leave the attention.

        Raises:
            KeysWritten: always.
        """
        super().update(keys, values, layer_idx, *args, **kwargs)
        raise KeysWritten


class KeysGiven(CacheView):
    """A cache view that hands out keys and values that are already written.

    Args:
        cache: the cache.
        keys: all keys of the layer.
        values: all values of the layer.
    """

    def __init__(self, cache: Cache | None, keys: Tensor, values: Tensor) -> None:
        super().__init__(cache)  # type: ignore[arg-type]
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Ignore the new keys (they are written already) and return all of them."""
        return self.keys, self.values
