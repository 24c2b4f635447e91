"""Examples: held-out questions stay out of training, and malformed files are named with their line."""

import json

import pytest

from moe_kit.errors import ConfigError
from moe_kit.training.data import held_out_examples, load_examples, read_jsonl
from moe_kit.training.recipe import DataConfig, TaskConfig

CHAIN = TaskConfig(name="chain_sum", settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
LEGS = TaskConfig(name="leg_counting", settings={"min_animals": 1, "max_animals": 1}, weight=3.0)


def questions(examples):
    return {e.question for e in examples}


def test_held_out_questions_never_occur_in_training():
    # 180 distinct questions in all, so drawing 60 + 120 without care would repeat nearly every one
    sets = load_examples(DataConfig(tasks=(CHAIN,), eval_examples=60), train_examples=120)
    assert len(sets.held_out) == len(questions(sets.held_out)) == 60
    assert len(sets.train) == len(questions(sets.train)) == 120
    assert not questions(sets.train) & questions(sets.held_out)


def test_a_leak_is_refused(monkeypatch):
    # plant the bug that the last check is there for: a stream that forgets what it gave
    from moe_kit.training import data

    monkeypatch.setattr(data, "_take", lambda stream, count, task, purpose: [next(data._distinct(task, GEN, ()))])
    GEN = data._generator(CHAIN, seed=5)
    with pytest.raises(ConfigError, match="held-out questions occur in training"):
        load_examples(DataConfig(tasks=(CHAIN,), eval_examples=1), train_examples=1)


def test_neighbouring_seeds_share_few_questions():
    one, two = (
        load_examples(DataConfig(tasks=(LEGS,), eval_examples=50, seed=seed), train_examples=1).held_out
        for seed in (0, 1)
    )
    assert len(questions(one) & questions(two)) < 40
    again = load_examples(DataConfig(tasks=(LEGS,), eval_examples=50, seed=0), train_examples=1).held_out
    assert [e.question for e in again] == [e.question for e in one]


def test_weights_share_out_the_training_examples():
    sets = load_examples(DataConfig(tasks=(CHAIN, LEGS), eval_examples=5), train_examples=80)
    counts = {name: sum(e.task == name for e in sets.train) for name in ("chain_sum", "leg_counting")}
    assert counts == {"chain_sum": 20, "leg_counting": 60}
    assert sets.train[0].example_id.split("/")[0] in counts


def test_more_held_out_questions_later_avoid_the_trained_ones():
    config = DataConfig(tasks=(CHAIN,), eval_examples=20)
    sets = load_examples(config, train_examples=60)
    same = held_out_examples(config, known=sets.train)
    assert [e.example_id for e in same.held_out] == [e.example_id for e in sets.held_out]
    more = held_out_examples(DataConfig(tasks=(CHAIN,), eval_examples=70), known=sets.train)
    assert len(more.held_out) == 70
    assert not questions(more.held_out) & questions(sets.train)


def test_a_task_with_too_few_questions_says_so():
    with pytest.raises(ConfigError, match=r"chain_sum has only \d+ further distinct questions, 5000 training"):
        load_examples(DataConfig(tasks=(CHAIN,), eval_examples=5), train_examples=5000)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (TaskConfig(name="chain_summ"), "no task 'chain_summ'; did you mean 'chain_sum'"),
        (TaskConfig(name="chain_sum", settings={"max_term": 3}), "no setting 'max_term'; did you mean 'max_terms'"),
        (TaskConfig(name="chain_sum", settings={"max_terms": 1}), "settings of chain_sum are refused"),
    ],
)
def test_unknown_tasks_and_settings(task, words):
    with pytest.raises(ConfigError, match=words):
        load_examples(DataConfig(tasks=(task,)), train_examples=1)


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_jsonl_in_both_forms(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
    path = write(tmp_path / "a.jsonl", [{"messages": messages}, "", {"prompt": "3 + 3?", "completion": "6"}])
    first, second = read_jsonl(path)
    assert (first.answer, len(first.messages), first.example_id) == ("4", 2, f"{path}:1")
    assert (second.answer, second.messages[0]["content"], second.example_id) == ("6", "3 + 3?", f"{path}:3")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'prompt': 1}", "not JSON"),
        ("[1, 2]", "got list, expected an object"),
        ('{"prompt": "a"}', "no text in 'completion'"),
        ('{"text": "a"}', "no text in 'prompt' and 'completion'"),
        ('{"prompt": "a", "completion": "  "}', "the answer is empty"),
        ('{"messages": []}', "at least two messages"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "expected 'assistant'"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', r"messages\[0\] must have"),
        ('{"messages": [{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}]}', "role 'bot'"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = tmp_path / "bad.jsonl"
    good = b'{"prompt": "a", "completion": "b"}\n'
    path.write_bytes(good * 2 + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(ConfigError, match=words) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no examples"):
        read_jsonl(tmp_path / "empty.jsonl")


def test_files_are_split_by_prompt(tmp_path, caplog):
    records = [{"prompt": f"question {i % 20}", "completion": str(i)} for i in range(60)]
    path = write(tmp_path / "a.jsonl", records)
    sets = load_examples(DataConfig(file=str(path), eval_examples=5), train_examples=1)
    assert len(sets.held_out) == 5
    assert len(sets.train) == 45
    assert not questions(sets.train) & questions(sets.held_out)
    assert "10 training examples ask a held-out question" in caplog.text


def test_a_held_out_file_wins_over_training(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "completion": "x"} for i in range(4)])
    held = write(tmp_path / "b.jsonl", [{"prompt": "  Q1 ", "completion": "x"}])
    sets = load_examples(DataConfig(file=str(train), eval_file=str(held)), train_examples=1)
    assert len(sets.train) == 3
    with pytest.raises(ConfigError, match="0 for training"):
        load_examples(DataConfig(file=str(held), eval_file=str(held)), train_examples=1)


def test_a_dataset_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "sums"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": f"q{i}", "completion": str(i)} for i in range(10)])
    datasets.disable_progress_bars()
    sets = load_examples(DataConfig(dataset=str(folder), eval_examples=3), train_examples=1)
    assert (len(sets.train), len(sets.held_out), sets.train[0].task) == (7, 3, "sums")
    with pytest.raises(ConfigError, match="cannot load"):
        load_examples(DataConfig(dataset=str(tmp_path / "nothing")), train_examples=1)
