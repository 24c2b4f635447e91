"""Forced routes are exact: with every cache, padded or not, with beams, chunks, second turns and assistants."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, StaticCache

from moe_kit import RoutingError
from moe_kit.depth import LayerRoutingConfig, force_layers, layer_applications
from moe_kit.hf.layers import find_decoder_layers
from tests.depth.families import FAMILIES, LAYERS, padded_batch, tiny

GREEDY = dict(max_new_tokens=7, do_sample=False)


def routed(family="llama", attention="sdpa", **config):
    base = tiny(family, attention)
    return get_peft_model(base, LayerRoutingConfig(**config)).eval()


def routes(model, rows=2):
    """A route a row that skips, executes and repeats, anchors left alone."""
    table = torch.tensor([[0, 2, 0, 1, 2], [2, 1, 0, 0, 2], [1, 0, 2, 2, 0]])[:rows]
    table[:, list(find_decoder_layers(model.get_base_model()).anchors)] = 1
    return table


def reference(base, batch, row):
    """Logits of a route by hand: the same layers in another list, each with its own arguments, no cache."""
    order = [index for index, action in enumerate(row.tolist()) for _ in range(action)]
    hand = copy.deepcopy(base)
    inner = hand.get_decoder()
    name = "layers" if hasattr(inner, "layers") else "h"
    layers = getattr(inner, name)
    setattr(inner, name, torch.nn.ModuleList([layers[index] for index in order]))
    hand.config.num_hidden_layers = len(order)
    if getattr(hand.config, "layer_types", None):
        hand.config.layer_types = [hand.config.layer_types[index] for index in order]
    return hand(**batch, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fresh_adapter_is_the_base_model(family, attention):
    batch = padded_batch()
    base = tiny(family, attention)
    expected = base(**batch).logits, base.generate(**batch, **GREEDY)
    model = get_peft_model(base, LayerRoutingConfig()).eval()
    assert torch.equal(model(**batch).logits, expected[0])
    assert torch.equal(model.generate(**batch, **GREEDY), expected[1])
    assert torch.equal(layer_applications(model), torch.ones(2, LAYERS, dtype=torch.long))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_route_equals_the_model_with_its_layers_rearranged(family):
    batch = padded_batch((9, 9))
    base = tiny(family)
    model = get_peft_model(copy.deepcopy(base), LayerRoutingConfig()).eval()
    table = routes(model)
    with force_layers(model, table):
        mixed = model(**batch, use_cache=False).logits
    assert torch.equal(layer_applications(model), table)
    for row in range(2):
        torch.testing.assert_close(mixed[row], reference(base, batch, table[row])[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ["one", "mixed"])
@torch.no_grad()
def test_every_cache_generates_what_no_cache_does(family, attention, rows):
    model = routed(family, attention)
    table = routes(model) if rows == "mixed" else routes(model)[:1]
    for lengths in ((9, 5), (7, 7)):
        batch = padded_batch(lengths)
        with force_layers(model, table):
            expected = model.generate(**batch, **GREEDY, use_cache=False)
            for name, options in {
                "dynamic": {},
                "static": dict(cache_implementation="static"),
                "chunked": dict(prefill_chunk_size=4),
            }.items():
                assert torch.equal(model.generate(**batch, **GREEDY, **options), expected), (name, lengths)
        if family != "gpt2":
            assert not torch.equal(model.generate(**batch, **GREEDY), expected), "the route changes nothing here"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_beams_follow_the_routes(family):
    model = routed(family)
    batch = padded_batch()
    for table in (routes(model)[:1], routes(model)):
        with force_layers(model, table):
            options = dict(**GREEDY, num_beams=3, num_return_sequences=2)
            expected = model.generate(**batch, **options, use_cache=False)
            assert torch.equal(model.generate(**batch, **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mixed_rows_equal_rows_alone(family):
    model = routed(family)
    table, batch = routes(model, 3), padded_batch((9, 5, 7))
    with force_layers(model, table):
        together = model.generate(**batch, **GREEDY)[:, 9:]
    for row, length in enumerate((9, 5, 7)):
        alone = {name: value[row : row + 1, 9 - length :] for name, value in batch.items()}
        with force_layers(model, table[row : row + 1]):
            assert torch.equal(model.generate(**alone, **GREEDY)[:, length:], together[row : row + 1])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "lazy"])
@torch.no_grad()
def test_second_turn_obeys_the_first_on_one_cache(family, kind):
    model = routed(family)
    config = model.get_base_model().config
    cache = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=40),
        "lazy": DynamicCache,
    }[kind]()
    table = routes(model)[:1]
    first, more = padded_batch((6,))["input_ids"], padded_batch((4,), seed=5)["input_ids"]
    with force_layers(model, table):
        start = model.generate(first, **GREEDY, past_key_values=cache)
        turn = torch.cat([start, more], 1)
        expected = model.generate(turn, **GREEDY, use_cache=False)
        if kind == "lazy" and config.model_type in ("gemma3_text", "mistral"):
            return  # a lazy cache of a sliding-window model keeps all keys: transformers itself differs there
        assert torch.equal(model.generate(turn, **GREEDY, past_key_values=cache), expected)
    # the route rides on the cache: obeyed without the context manager, refused if it differs
    with pytest.raises(RoutingError, match="continues with the routes"), force_layers(model, torch.ones_like(table)):
        model(more, past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@torch.no_grad()
def test_assisted_decoding_equals_plain(family):
    model, assistant = routed(family), tiny(family, seed=3)
    batch = padded_batch((7,))
    for row in routes(model):
        with force_layers(model, row[None]):
            expected = model.generate(**batch, **GREEDY)
            assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=assistant), expected)
            assert torch.equal(model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@torch.no_grad()
def test_skipped_layers_are_not_called_and_keep_no_keys(family):
    model = routed(family)
    anchors = find_decoder_layers(model.get_base_model()).anchors
    table = torch.zeros(1, LAYERS, dtype=torch.long)
    table[:, list(anchors)] = 1
    calls = []
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    with force_layers(model, table):
        out = model(**padded_batch(), use_cache=True, output_hidden_states=True)
    assert calls == list(anchors)
    lengths = [cache.get_seq_length() for cache in out.past_key_values.layers[:LAYERS]]
    assert lengths == [9 if index in anchors else 0 for index in range(LAYERS)]
    assert len(out.hidden_states) == LAYERS + 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_rows_of_a_cache_may_be_reordered_repeated_and_selected(family):
    model = routed(family)
    table, batch, more = routes(model, 3), padded_batch((9, 5, 7)), padded_batch((2, 2, 2), seed=7)["input_ids"]
    moves = {
        "reorder": (lambda cache, rows: cache.reorder_cache(rows), [2, 0, 0]),
        "select": (lambda cache, rows: cache.batch_select_indices(rows), [2, 1]),
        "repeat": (lambda cache, rows: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    }
    for move, order in moves.values():
        rows = torch.tensor(order)
        ids = torch.cat([batch["input_ids"][rows], more[rows]], 1)
        mask = torch.cat([batch["attention_mask"][rows], torch.ones_like(more[rows])], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with force_layers(model, table):
            cache = model(**batch, position_ids=positions_of(batch), use_cache=True).past_key_values
        move(cache, rows)
        step = model(more[rows], attention_mask=mask, position_ids=positions[:, -2:], past_key_values=cache)
        with force_layers(model, table[rows]):
            whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        torch.testing.assert_close(step.logits, whole.logits[:, -2:], rtol=1e-4, atol=1e-4)


def positions_of(batch):
    return (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def test_cache_filled_without_routes_is_refused():
    model = routed()
    ids = padded_batch((6,))["input_ids"]
    with model.disable_adapter():
        cache = model(ids, use_cache=True).past_key_values
    model(ids, past_key_values=cache)  # executing everything is what the cache holds
    with model.disable_adapter():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(RoutingError, match="computed without these routes"), force_layers(model, [[1, 0, 1, 1, 1]]):
        model(ids, past_key_values=cache)


@torch.no_grad()
def test_anchor_skip_is_refused_with_a_cache_and_exact_without():
    base = tiny()
    model = get_peft_model(copy.deepcopy(base), LayerRoutingConfig(layers=[0, 1, 2])).eval()
    batch = padded_batch()
    table = torch.tensor([[0, 1, 2, 1, 1]])
    with force_layers(model, table):
        with pytest.raises(RoutingError, match="first layer of its attention kind"):
            model.generate(**batch, **GREEDY)
        actual = model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], reference(base, batch, table[0])[real], rtol=1e-4, atol=1e-4)
    with force_layers(model, [[2, 0, 1, 1, 1]]):
        cached = model.generate(**batch, **GREEDY)
        assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([[0, 1, 1, 1, 1]], "not routed"),
        ([[1, 1, 1, 1]], r"expected \[rows, 5\]"),
        ([[1, 1, 4, 1, 1]], "expected 0 skip"),
        ([[1, 3, 1, 1, 1]], "needs a forecaster"),
    ],
)
def test_bad_actions_are_refused(actions, message):
    with pytest.raises(RoutingError, match=message), force_layers(routed(), actions):
        pass


def test_rows_that_do_not_fit_are_refused():
    model = routed()
    with pytest.raises(RoutingError, match="actions for 2 rows"), force_layers(model, routes(model)):
        model(**padded_batch((5, 5, 5)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_checkpointing_gives_the_same_gradients(family):
    batch = padded_batch((9, 9))
    grads = []
    for checkpointing in (False, True):
        model = routed(family).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable(dict(use_reentrant=False))
            model.get_base_model().enable_input_require_grads()
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        with force_layers(model, routes(model)):
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1])
    assert len(grads[0]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)
