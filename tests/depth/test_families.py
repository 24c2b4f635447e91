"""What must hold on every supported family, in few passes each; the same at length for some in the other files."""

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, StaticCache

from moe_kit import LayerRoutingConfig, load_adapters, save_adapters
from moe_kit.depth import calibrate_budget, force_layers, layer_applications
from moe_kit.hf.layers import find_attention, find_decoder_layers
from tests.depth.families import FAMILIES, LAYERS, padded_batch, tiny
from tests.depth.test_forced_routes import routes
from tests.depth.test_routers import routed, scramble

GREEDY = dict(max_new_tokens=3, do_sample=False)
every_family = pytest.mark.parametrize("family", FAMILIES)


def alone(batch, row, length):
    """A row of a left-padded batch without its padding."""
    return {name: value[row : row + 1, batch["input_ids"].shape[1] - length :] for name, value in batch.items()}


@every_family
@torch.no_grad()
def test_a_decision_is_that_of_its_prompt_alone(family):
    model, lengths = routed("dr_llm", family), (9, 5, 12)
    batch = padded_batch(lengths)
    model.generate(**batch, **GREEDY)
    together = layer_applications(model)
    assert (together != 1).any(), "the routers here never do anything"
    for row, length in enumerate(lengths):
        model(**alone(batch, row, length))
        assert torch.equal(layer_applications(model), together[row : row + 1])


@every_family
@pytest.mark.parametrize("preset", ["first", "informed"])
def test_the_language_loss_reaches_the_routers_and_not_the_base(preset, family):
    model, batch = routed(preset, family, losses={}).train(), padded_batch((9, 7))
    torch.manual_seed(3)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    last = [p.grad for name, p in model.named_parameters() if "scorer.last.weight" in name]
    assert len(last) >= 3
    assert all(grad is not None and grad.abs().sum() > 0 for grad in last)
    assert all(p.grad is None for name, p in model.named_parameters() if "moe_depth" not in name)


@every_family
def test_the_realised_rate_is_the_asked_one_without_padding(family):
    batch = padded_batch((12, 4))
    model = routed("informed", family)
    with torch.no_grad():
        budget, share = calibrate_budget(model, [batch], 0.4, tolerance=0.05)
    assert 0 < budget < 1
    assert share == pytest.approx(0.4, abs=0.05)
    # in training, Mixture-of-Depths takes exactly its share of each row's real tokens
    model = routed("mod", family).train()
    model(**batch, labels=batch["input_ids"])
    anchors = find_decoder_layers(model.get_base_model()).anchors
    wanted = [1.0 if layer in anchors else 0.5 for layer in range(LAYERS)]
    assert layer_applications(model).tolist() == [wanted, wanted]


@every_family
@torch.no_grad()
def test_saved_adapters_come_back(family, tmp_path):
    batch, model = padded_batch((12, 7)), tiny(family)
    model.add_adapter(LayerRoutingConfig(), "depth")
    scramble(model.eval())
    expected, applied = model(**batch).logits, layer_applications(model)
    assert (applied != 1).any()
    save_adapters(model, tmp_path)
    again = tiny(family)
    load_adapters(again, tmp_path)
    assert torch.equal(again.eval()(**batch).logits, expected)
    assert torch.equal(layer_applications(again), applied)


@every_family
@torch.no_grad()
def test_skipped_layers_do_nothing_and_leave_their_place_in_the_outputs(family):
    model = get_peft_model(tiny(family), LayerRoutingConfig()).eval()
    found = find_decoder_layers(model.get_base_model())
    table = torch.zeros(1, LAYERS, dtype=torch.long)
    table[:, list(found.anchors)] = 1
    calls = []
    for index, layer in enumerate(found.layers):
        attention = getattr(layer, find_attention(layer))
        attention.register_forward_hook(lambda *_, index=index: calls.append(index))
    with force_layers(model, table):
        out = model(**padded_batch(), use_cache=True, output_hidden_states=True)
    assert calls == list(found.anchors)
    lengths = [cache.get_seq_length() for cache in out.past_key_values.layers[:LAYERS]]
    assert lengths == [9 if index in found.anchors else 0 for index in range(LAYERS)]
    assert len(out.hidden_states) == LAYERS + 1
    # the state behind a skipped layer is the one before it (the last is normed)
    for index in set(range(LAYERS - 1)) - set(found.anchors):
        assert torch.equal(out.hidden_states[index + 1], out.hidden_states[index])


@every_family
@torch.no_grad()
def test_a_second_turn_of_padded_rows_with_routes_of_their_own(family):
    model = get_peft_model(tiny(family), LayerRoutingConfig()).eval()
    config, table, batch = model.get_base_model().config, routes(model), padded_batch((9, 5))
    more = padded_batch((4, 4), seed=5)["input_ids"]
    caches = [DynamicCache(config=config)]
    if family in ("llama", "gemma3", "gpt2"):
        caches.append(StaticCache(config=config, max_cache_len=40))
    for cache in caches:
        with force_layers(model, table):
            start = model.generate(**batch, **GREEDY, past_key_values=cache)
            turn = torch.cat([start, more], 1)
            mask = torch.cat([batch["attention_mask"], torch.ones(2, turn.shape[1] - 9, dtype=torch.long)], 1)
            expected = model.generate(turn, attention_mask=mask, **GREEDY, use_cache=False)
            actual = model.generate(turn, attention_mask=mask, **GREEDY, past_key_values=cache)
        assert torch.equal(actual, expected), type(cache).__name__


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "phi3", "gpt2", "qwen3_moe"])
@torch.no_grad()
def test_beams_of_a_static_cache_and_guessed_tokens(family):
    model, batch = get_peft_model(tiny(family), LayerRoutingConfig()).eval(), padded_batch()
    table = routes(model)
    with force_layers(model, table):
        beams = dict(**GREEDY, num_beams=3)
        expected = model.generate(**batch, **beams, use_cache=False)
        assert torch.equal(model.generate(**batch, **beams, cache_implementation="static"), expected)
    one = padded_batch((7,))
    with force_layers(model, table[:1]):
        expected = model.generate(**one, **GREEDY)
        assert torch.equal(model.generate(**one, **GREEDY, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("preset", ["informed", "flexi", "mod"])
@torch.no_grad()
def test_token_scope_goes_on_in_a_second_turn_and_with_an_assistant(preset):
    model, one = routed(preset), padded_batch((7,))
    expected = model.generate(**one, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**one, **GREEDY, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(model.generate(**one, **GREEDY, assistant_model=tiny(seed=3)), expected)
    config, batch = model.get_base_model().config, padded_batch((9, 5))
    more = padded_batch((4, 4), seed=5)["input_ids"]
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=40)):
        start = model.generate(**batch, **GREEDY, past_key_values=cache)
        turn = torch.cat([start, more], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, turn.shape[1] - 9, dtype=torch.long)], 1)
        expected = model.generate(turn, attention_mask=mask, **GREEDY, use_cache=False)
        assert torch.equal(model.generate(turn, attention_mask=mask, **GREEDY, past_key_values=cache), expected), type(
            cache
        ).__name__
