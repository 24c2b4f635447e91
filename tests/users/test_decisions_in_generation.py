"""One decision a request, made on its prompt: without a cache, with candidates, in evaluation harnesses, in joined batches."""

import pytest
import torch
from peft import get_peft_model

import moe_kit
from moe_kit import LayerRoutingConfig, RoutedAdapterConfig, RoutingError
from tests.tiny import tiny_llama
from tests.users.test_two_passes import TARGETS, wake

PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
NEW = 6
GREEDY = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=0)


def routed(**options):
    config = RoutedAdapterConfig.from_preset(
        "mixture_of_lora", num_experts=4, top_k=2, r=3, target_modules=TARGETS, task_type="CAUSAL_LM", **options
    )
    return wake(get_peft_model(tiny_llama().eval(), config)).eval()


def expected(model, ids=PROMPT):
    """Greedy tokens by whole passes, each told where the prompt ends."""
    width, mask = ids.shape[1], (ids != 0).long()
    for _ in range(NEW):
        with moe_kit.routing_inputs(model, prompt_length=mask[:, :width].sum(1)), torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


WAYS = {
    "without a cache": dict(use_cache=False),
    "static cache": dict(cache_implementation="static"),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "assistant": dict(assistant_model=tiny_llama, num_assistant_tokens=3),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("scope", ["sequence", "request"])
def test_the_prompt_decides(scope, way):
    model = routed(scope=scope)
    options = {name: value().eval() if name == "assistant_model" else value for name, value in way.items()}
    assert torch.equal(model.generate(input_ids=PROMPT, **GREEDY, **options), expected(model))


def test_padded_rows_without_a_cache():
    model = routed(scope="sequence")
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13]])
    found = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False, **GREEDY)
    assert torch.equal(found, expected(model, ids))


def test_beams_without_a_cache():
    model = routed(scope="sequence")
    beams = dict(num_beams=3, **GREEDY)
    found = model.generate(input_ids=PROMPT, use_cache=False, **beams)
    assert torch.equal(found, model.generate(input_ids=PROMPT, **beams))


def test_a_second_call_decides_anew():
    model = routed(scope="sequence")
    other = torch.tensor([[30, 31, 32, 33]])
    model.generate(input_ids=PROMPT, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(input_ids=other, use_cache=False, **GREEDY), expected(model, other))


@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_right_padding_without_a_mask(padding):
    """As lm-eval scores rows: padded with 0, or the padding token, and no mask."""
    model = routed(scope="sequence")
    model.get_base_model().config.pad_token_id = padding or None
    rows = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23]]
    batch = torch.tensor([row + [padding] * (7 - len(row)) for row in rows])
    together = model(input_ids=batch).logits
    for index, row in enumerate(rows):
        alone = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(together[index, : len(row)], alone, rtol=1e-4, atol=1e-4)


def joined(model):
    from transformers import GenerationConfig

    rows = [[5, 6, 7], [9, 10, 11, 12]]
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    results = model.generate_batch(inputs=rows, generation_config=config)
    plain = dict(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    wanted = [model.generate(input_ids=torch.tensor([row]), **plain)[0, len(row) :].tolist() for row in rows]
    return [result.generated_tokens for result in results.values()], wanted


@pytest.mark.parametrize("options", [{}, dict(router_sharing="model")], ids=["input", "model"])
def test_continuous_batching_for_tokens(options):
    found, wanted = joined(routed(**options))
    assert found == wanted


@pytest.mark.parametrize("scope", ["sequence", "request"])
def test_continuous_batching_refuses_decisions_about_sequences(scope):
    with pytest.raises(RoutingError, match="nothing tells which token belongs to which"):
        joined(routed(scope=scope))


def test_continuous_batching_refuses_layer_routes_of_a_prompt():
    model = wake(get_peft_model(tiny_llama(layers=4), LayerRoutingConfig.from_preset("first", task_type="CAUSAL_LM")))
    with pytest.raises(RoutingError, match="nothing tells which token belongs to which"):
        joined(model.eval())
