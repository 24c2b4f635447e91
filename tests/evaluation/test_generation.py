"""Batched generation and likelihood equal one example at a time."""

import math

import pytest
import torch

from moe_kit.evaluation.generation import generate_answers
from moe_kit.evaluation.likelihood import answer_likelihood
from moe_kit.training.data import Example
from moe_kit.training.encoding import encode_answer, encode_prompt
from moe_kit.training.models import tiny_model, tiny_tokenizer
from moe_kit.training.recipe import DataConfig

PROMPTS = ("a much longer prompt than the others", "short", "something in between", "x", "last one")
CONFIG = DataConfig()


@pytest.fixture(scope="module")
def model():
    # louder weights, so that a random model says different things after different prompts
    model = tiny_model(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def examples():
    return [
        Example(
            example_id=f"t/{i}",
            task="even" if i % 2 == 0 else "odd",
            messages=({"role": "user", "content": p},),
            answer="ok" * (i + 1),
        )
        for i, p in enumerate(PROMPTS)
    ]


def test_answers_do_not_depend_on_the_batch(model, tokenizer, examples):
    steps = []
    batched = generate_answers(
        model, tokenizer, examples, CONFIG, batch_size=3, max_new_tokens=6, progress=steps.append
    )
    alone = [generate_answers(model, tokenizer, [e], CONFIG, batch_size=1, max_new_tokens=6)[0] for e in examples]
    assert batched == alone
    assert len(set(alone)) > 1, "all answers equal: the test would not see a wrong order"
    assert sum(steps) == len(examples)


def test_training_mode_comes_back(model, tokenizer, examples):
    model.train()
    generate_answers(model, tokenizer, examples[:1], CONFIG, max_new_tokens=1)
    assert model.training
    model.eval()
    answer_likelihood(model, tokenizer, examples[:1], CONFIG)
    assert not model.training


def test_likelihood_is_the_sum_over_answer_tokens(model, tokenizer, examples):
    found = answer_likelihood(model, tokenizer, examples, CONFIG, batch_size=2)
    for task in ("even", "odd"):
        losses, tokens = [], 0
        for example in (e for e in examples if e.task == task):
            prompt, answer = (f(example, tokenizer, CONFIG) for f in (encode_prompt, encode_answer))
            with torch.no_grad():
                log_p = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            losses.append(-sum(log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)))
            tokens += len(answer)
        n, mean = len(losses), sum(losses) / len(losses)
        assert found[task].nats_per_answer == pytest.approx(mean, rel=1e-5)
        assert found[task].nats_per_token == pytest.approx(sum(losses) / tokens, rel=1e-5)
        spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / (n - 1) / n)
        assert found[task].stderr == pytest.approx(spread, rel=1e-4)
        assert found[task].count == n
