"""Decisions on a cache, and the mask that a static cache hides."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from moe_kit import RoutingError
from moe_kit.hf.cache import carried, carry, ensure_carrier, mask_diagonal, second_slot

CONFIG = LlamaConfig(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=11, intermediate_size=8
)


def keys(rows=2, tokens=3):
    return torch.randn(rows, 1, tokens, 4)


@pytest.mark.parametrize("make", [lambda: DynamicCache(config=CONFIG), lambda: StaticCache(CONFIG, 8), DynamicCache])
def test_decisions_follow_the_rows_and_end_with_the_cache(make):
    cache = make()
    assert carried(None) is None
    assert carried(cache) is None
    carry(cache, "a", torch.tensor([3, 7]), num_layers=2)
    for layer in range(2):
        cache.update(keys(), keys(), layer)
    assert len([layer for layer in cache.layers if layer.keys is not None]) == 2
    cache.reorder_cache(torch.tensor([1, 1]))
    assert carried(cache)["a"].tolist() == [7, 7]
    carry(cache, "a", torch.tensor([3, 7]))
    if isinstance(cache, DynamicCache):
        cache.batch_repeat_interleave(2)
        assert carried(cache)["a"].tolist() == [3, 3, 7, 7]
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.crop(-1)
    assert carried(cache)["a"].tolist() == [3, 7]
    assert cache.get_seq_length() == (2 if isinstance(cache, DynamicCache) else 3)
    cache.reset()
    assert not carried(cache)


def test_an_empty_lazy_cache_needs_the_number_of_layers():
    with pytest.raises(RoutingError, match="needs num_layers"):
        carry(DynamicCache(), "a", torch.tensor([1]))
    with pytest.raises(RoutingError, match="cannot ride on a int"):
        ensure_carrier(3, 2)


@pytest.mark.parametrize("make", [lambda: DynamicCache(config=CONFIG), lambda: StaticCache(CONFIG, 8)])
def test_second_slots_are_empty_and_share_nothing(make):
    cache = make()
    carrier = ensure_carrier(cache, 2)
    first = keys()
    for layer in range(2):
        cache.update(first, first, layer)
    slot = second_slot(cache, carrier, 1)
    assert slot == second_slot(cache, carrier, 1) == 3
    assert cache.get_seq_length(slot) == 0
    second = keys()
    out, _ = cache.update(second, second, slot)
    assert torch.equal(out[:, :, :3], second)
    assert torch.equal(cache.layers[1].keys[:, :, :3], first)


def test_mask_diagonal_finds_padding():
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    causal = torch.ones(4, 4).tril().bool()
    mask = (causal[None] & real[:, None])[:, None]
    assert torch.equal(mask_diagonal(mask, (2, 4), 0), real)
    additive = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    assert torch.equal(mask_diagonal({"full_attention": additive}, (2, 4), 0), real)
    # two tokens in the cache, room for six
    later = torch.nn.functional.pad(mask[:, :, 2:], (0, 2))
    assert torch.equal(mask_diagonal(later, (2, 2), 2), real[:, 2:])
    assert mask_diagonal(None, (2, 4), 0) is None
    assert mask_diagonal(real, (2, 4), 0) is None
