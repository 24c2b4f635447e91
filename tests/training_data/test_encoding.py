"""Tokens: labels on the answer only, truncation that spares it, padding, and the narrow head."""

import pytest
import torch

from moe_kit.errors import ConfigError
from moe_kit.training.data import Example
from moe_kit.training.encoding import IGNORED, Collator, EncodedExamples, encode_example, encode_prompt
from moe_kit.training.models import tiny_model, tiny_tokenizer
from moe_kit.training.recipe import DataConfig


def example(prompt="what is 2 + 2?", answer="four", name="e/0"):
    return Example(example_id=name, task="t", messages=({"role": "user", "content": prompt},), answer=answer)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_labels_are_the_answer_and_its_end(tokenizer):
    row = encode_example(example(), tokenizer, DataConfig())
    labelled = [i for i, label in zip(row["input_ids"], row["labels"]) if label != IGNORED]
    assert tokenizer.decode(labelled) == "four<eos>"
    assert [label for label in row["labels"] if label != IGNORED] == labelled
    prompt = encode_prompt(example(), tokenizer, DataConfig())
    assert row["input_ids"][: len(prompt)] == prompt
    assert tokenizer.decode(prompt) == "<user>what is 2 + 2?<assistant>"


def test_nothing_after_the_end_of_the_turn_is_learnt(tokenizer):
    config = DataConfig(
        chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = encode_example(example(), tokenizer, config)
    assert tokenizer.decode(row["input_ids"]) == "[user]what is 2 + 2?<eos>\n[assistant]four<eos>"
    assert sum(label != IGNORED for label in row["labels"]) == 5


def test_a_template_without_an_end_token_gets_one(tokenizer):
    config = DataConfig(
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = encode_example(example(), tokenizer, config)
    assert tokenizer.decode(row["input_ids"]).endswith("assistant: four<eos>")


def test_system_prompt(tokenizer):
    assert tokenizer.decode(encode_prompt(example(), tokenizer, DataConfig(system_prompt="Hi"))).startswith("<user>Hi")
    own = Example(example_id="e", task="t", messages=({"role": "system", "content": "Own"},), answer="x")
    assert "Hi" not in tokenizer.decode(encode_prompt(own, tokenizer, DataConfig(system_prompt="Hi")))


@pytest.mark.parametrize("length", [6, 7, 12, 20, 21])
def test_truncation_spares_the_answer(tokenizer, length):
    whole = encode_example(example(), tokenizer, DataConfig(max_length=512))
    row = encode_example(example(), tokenizer, DataConfig(max_length=length))
    assert len(row["input_ids"]) == min(length, len(whole["input_ids"]))
    assert tokenizer.decode([i for i in row["labels"] if i != IGNORED]) == "four<eos>"
    assert row["input_ids"] == whole["input_ids"][-len(row["input_ids"]) :]
    assert row["cut"] == (length < len(whole["input_ids"]))


def test_an_answer_that_does_not_fit_raises(tokenizer):
    with pytest.raises(ConfigError, match=r"e/0 is too long: 16 tokens of prompt and 5 of answer"):
        encode_example(example(), tokenizer, DataConfig(max_length=5))


def test_the_other_rules_for_long_examples(tokenizer, caplog):
    rows = [example(), example("short", "x", "e/1")]
    with pytest.raises(ConfigError, match="too long"):
        EncodedExamples(rows, tokenizer, DataConfig(max_length=12, too_long="error"))
    kept = EncodedExamples(rows, tokenizer, DataConfig(max_length=12, too_long="drop"))
    assert [row["example_id"] for row in kept] == ["e/1"]
    assert "1 of 2 examples are longer than 12 tokens: dropped" in caplog.text
    with pytest.raises(ConfigError, match="all 2 examples"):
        EncodedExamples(rows, tokenizer, DataConfig(max_length=3, too_long="drop"))
    EncodedExamples(rows, tokenizer, DataConfig(max_length=12))
    assert "1 of 2 prompts lost their beginning" in caplog.text


def test_a_missing_chat_template_is_named(tokenizer):
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template: give one as data.chat_template"):
        encode_prompt(example(), bare, DataConfig())


def test_collator_keeps_ids_and_pads_left(tokenizer):
    rows = EncodedExamples([example(), example("hm", "no", "e/1")], tokenizer, DataConfig())
    batch = Collator(pad_token_id=tokenizer.pad_token_id)(rows)
    assert batch["example_ids"] == ["e/0", "e/1"]
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    # five label columns, and the one before them that predicts the first
    assert len(batch["logits_to_keep"]) == batch["labels"].shape[1] == 6
    wide = Collator(pad_token_id=3, answer_logits_only=False)(rows)
    assert wide["labels"].shape == wide["input_ids"].shape
    assert "logits_to_keep" not in wide


def test_the_narrow_head_and_left_padding_change_nothing(tokenizer):
    model = tiny_model()
    rows = EncodedExamples(
        [example(), example("hm", "no", "e/1"), example("a b", "yes it is")], tokenizer, DataConfig()
    )
    narrow, wide = (Collator(pad_token_id=3, answer_logits_only=flag)(rows) for flag in (True, False))
    narrow.pop("example_ids"), wide.pop("example_ids")
    with torch.no_grad():
        one, two = model(**narrow), model(**wide)
        torch.testing.assert_close(one.loss, two.loss)
        # and each row alone, unpadded
        total = count = 0
        for row in rows:
            labels = torch.tensor([row["labels"]])
            n = int((labels != IGNORED).sum())
            total += n * model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
            count += n
    torch.testing.assert_close(one.loss, total / count)
