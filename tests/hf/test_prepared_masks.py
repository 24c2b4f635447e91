"""Padding is found where `generate` hides it: in the four-dimensional masks that it prepares for static caches."""

import pytest
import torch
from transformers import StaticCache

from moe_kit.hf.batch import real_tokens
from moe_kit.routing.state import require_routing_state
from tests.conformance.common import routed
from tests.tiny import batch_of

REAL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()


def prepared(real=REAL, room=0):
    """Causal mask bool [B, 1, S, S + room], as transformers makes it."""
    length = real.shape[1]
    causal = torch.ones(length, length).tril().bool()
    return torch.nn.functional.pad((causal[None] & real[:, None])[:, None], (0, room))


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [lambda m: m, additive, lambda m: {"full_attention": m, "sliding_attention": m}])
@pytest.mark.parametrize("room", [0, 5])
def test_the_diagonal_tells(form, room):
    assert torch.equal(real_tokens(form(prepared(room=room)), REAL.shape), REAL)


def test_a_later_chunk_lies_behind_the_cache():
    class Filled:
        def get_seq_length(self):
            return torch.tensor(2)

    chunk = prepared(room=3)[:, :, 2:]
    assert torch.equal(real_tokens(chunk, torch.Size([2, 2]), Filled()), REAL[:, 2:])


def test_a_single_token_is_never_asked():
    class Device:
        def get_seq_length(self):
            raise AssertionError("a decoding step waited for the device")

    assert real_tokens(prepared()[:, :, -1:], torch.Size([2, 1]), Device()) is None


@torch.no_grad()
def static_pass(model, batch):
    """What `generate` does at the first step with a static cache."""
    real = batch["attention_mask"].bool()
    positions = (real.long().cumsum(1) - 1).masked_fill(~real, 1)
    inner = model.get_base_model()
    cache = StaticCache(config=inner.config, max_cache_len=real.shape[1] + 4)
    mask = prepared(real, room=4)
    return model(batch["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("scope", ["token", "sequence"])
@torch.no_grad()
def test_adapters_decide_as_with_a_plain_mask(scope):
    model = routed(scope=scope).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moe_adapter" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    batch = batch_of(rows=2)
    batch.pop("labels")
    batch["attention_mask"][0, :3] = 0
    real = batch["attention_mask"].bool()
    positions = (real.long().cumsum(1) - 1).masked_fill(~real, 1)
    expected = model(**batch, position_ids=positions).logits
    actual = static_pass(model, batch)
    context = require_routing_state(model).context
    assert torch.equal(context.mask_BS, real)
    # padding before the prompt makes positions start anew; it is no second document
    assert context.sequence_BS is None
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


def test_packed_documents_under_a_prepared_mask():
    model = routed(scope="sequence").eval()
    ids = batch_of(rows=1)["input_ids"][:, :6]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    block = torch.zeros(6, 6).bool()
    block[:3, :3] = block[3:, 3:] = torch.ones(3, 3).tril().bool()
    with torch.no_grad():
        model(ids, attention_mask=block[None, None], position_ids=positions)
    assert require_routing_state(model).context.sequence_BS.tolist() == [[0, 0, 0, 1, 1, 1]]
