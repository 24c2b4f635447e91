"""Examples: where they come from, and what keeps training and evaluation apart.

Three sources, one shape. An `Example` is a prompt (chat messages), one answer, a task name and an id that says where it
came from (`chain_sum/17`, `notes.jsonl:3`), so that any later message can name it.

- generated: mixtures of reasoning-gym tasks (arXiv 2505.24760), answers scored by the task's own scorer
- a local JSONL file: `{"messages": [...]}` ending with the assistant, or `{"prompt": ..., "completion": ...}`
- a `datasets` name with those columns

Held-out examples are drawn first; a training example whose question (spaces and case aside) is among the held-out ones
is passed over. `load_examples` checks at the end that the two sets share no question and raises if they do.

Not here: tokens. `moe_kit.training.encoding` turns examples into token ids, labels and padded batches.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_kit.errors import ConfigError
from moe_kit.training.recipe import DataConfig, TaskConfig

__all__ = ["Example", "ExampleSets", "held_out_examples", "load_examples", "read_jsonl"]

logger = logging.getLogger(__name__)

# a generator that yields this many repeated questions in a row has no more to give
_PATIENCE = 2000
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with its answer."""

    example_id: str
    """Where it came from: `task/index`, `file:line` or `dataset[index]`."""

    task: str
    """Name of the task; the file's or dataset's name for those."""

    messages: tuple[dict[str, str], ...]
    """The prompt as chat messages with `role` and `content`; the answer is not among them."""

    answer: str
    """What the assistant should reply."""

    entry: dict[str, Any] | None = None
    """The generator's own record, which its scorer asks for."""

    @property
    def question(self) -> str:
        """The prompt's text in one normal form: roles and contents, spaces collapsed, lower case."""
        return " ".join(" ".join(f"{m['role']}: {m['content']}" for m in self.messages).lower().split())


@dataclass(frozen=True, kw_only=True)
class ExampleSets:
    """Training and held-out examples with nothing in common."""

    train: tuple[Example, ...]
    """Training examples, shuffled."""

    held_out: tuple[Example, ...]
    """Held-out examples, grouped by task."""

    scorers: dict[str, Any] = field(default_factory=dict)
    """Task -> `score_answer(answer, entry) -> float in [0, 1]`; a task without one is scored by exact match."""


def load_examples(config: DataConfig, *, train_examples: int) -> ExampleSets:
    """Make or read the examples that a data section asks for.

    Args:
        config: The data section; exactly one source is set.
        train_examples: Training examples to generate where `config.train_examples` is None. For files and datasets
            that is all there are.

    Returns:
        Training and held-out examples that share no question.

    Raises:
        ConfigError: A source is missing or malformed (with file and line), a task or one of its settings is unknown, or
            a task has too few distinct questions.
    """
    if config.tasks:
        sets = _generate(config, config.train_examples or train_examples)
    else:
        sets = _from_records(config)
    shared = {e.question for e in sets.held_out} & {e.question for e in sets.train}
    if shared:
        raise ConfigError(f"{len(shared)} held-out questions occur in training, expected none, {min(shared)!r} say")
    return sets


def held_out_examples(config: DataConfig, *, known: Sequence[Example]) -> ExampleSets:
    """Make or read held-out examples for a model that is already trained.

    Args:
        config: The data section; it may ask for more held-out examples, or other tasks, than training did.
        known: The examples that the model was trained on; none of their questions comes back.

    Returns:
        No training examples, and `eval_examples` held-out ones a task. With the section of the training run these are
        that run's held-out examples.

    Raises:
        ConfigError: As for `load_examples`.
    """
    questions = {example.question for example in known}
    if config.tasks:
        return _generate(config, 0, known=questions)
    examples = read_jsonl(config.eval_file) if config.eval_file else _shuffled_records(config)
    held_out = list({e.question: e for e in examples if e.question not in questions}.values())
    if not config.eval_file:
        held_out = held_out[: config.eval_examples]
    if not held_out:
        raise ConfigError(f"data: all {len(examples)} examples were trained on; give data.eval_file")
    return ExampleSets(train=(), held_out=tuple(held_out))


def read_jsonl(path: str | Path) -> list[Example]:
    """Read a JSONL file with `messages` or `prompt` / `completion` on each line; blank lines are passed over.

    Args:
        path: The file, in UTF-8.

    Returns:
        One example a line. The last message, which must be the assistant's, is the answer.

    Raises:
        ConfigError: The file is missing or empty, or a line is not JSON or lacks a field; the message gives file and
            line number.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"data file {path}: no such file")
    examples = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ConfigError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}); one JSON object a line"
                ) from None
            examples.append(_example_from_record(record, where, task=path.stem))
    if not examples:
        raise ConfigError(f"data file {path} holds no examples")
    return examples


def _generate(config: DataConfig, train_examples: int, known: Collection[str] = ()) -> ExampleSets:
    """Generate a mixture: each task's held-out questions first, then other ones for training; none that is `known`."""
    total = sum(task.weight for task in config.tasks)
    train: list[Example] = []
    held_out: list[Example] = []
    scorers = {}
    for task in config.tasks:
        # reasoning-gym seeds item i with seed + i, so neighbouring seeds give the same questions: keep recipe seeds
        # a million apart
        generator = _generator(task, seed=1_000_003 * (1 + config.seed))
        scorers[task.name] = generator.score_answer
        stream = _distinct(task.name, generator, known)
        held_out += _take(stream, config.eval_examples, task.name, "held-out")
        if train_examples:
            train += _take(stream, max(1, round(train_examples * task.weight / total)), task.name, "training")
    random.Random(config.seed).shuffle(train)
    return ExampleSets(train=tuple(train), held_out=tuple(held_out), scorers=scorers)


def _generator(task: TaskConfig, *, seed: int) -> Any:
    """Create a reasoning-gym generator, its errors turned into ours."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError("data.tasks needs the package reasoning-gym: pip install 'moe-kit[eval]'") from error

    if task.name not in DATASETS:
        near = difflib.get_close_matches(task.name, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(DATASETS))}"
        raise ConfigError(f"data.tasks: reasoning-gym has no task {task.name!r}; {hint}")
    known = DATASETS[task.name][1].__dataclass_fields__
    for key in task.settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(set(known) - {'seed', 'size'}))}"
            )
            raise ConfigError(f"data.tasks: {task.name} has no setting {key!r}; {hint}")
    try:
        return reasoning_gym.create_dataset(task.name, seed=seed, size=1_000_000, **task.settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"data.tasks: settings of {task.name} are refused: {error}") from error


def _distinct(task: str, generator: Any, known: Collection[str]) -> Iterator[Example]:
    """Yield a generator's examples, each question once; end after `_PATIENCE` in a row that were seen."""
    seen: set[str] = set(known)
    repeats = index = 0
    while repeats < _PATIENCE and index < len(generator):
        entry = generator[index]
        example = Example(
            example_id=f"{task}/{index}",
            task=task,
            messages=({"role": "user", "content": entry["question"].strip()},),
            answer=str(entry["answer"]),
            entry=entry,
        )
        index += 1
        if example.question in seen:
            repeats += 1
            continue
        seen.add(example.question)
        repeats = 0
        yield example


def _take(stream: Iterator[Example], count: int, task: str, purpose: str) -> list[Example]:
    """Take `count` examples or say that the task has too few."""
    taken = [example for _, example in zip(range(count), stream)]
    if len(taken) < count:
        raise ConfigError(
            f"data.tasks: {task} has only {len(taken)} further distinct questions, {count} {purpose} ones are asked for:"
            " widen its settings, lower its weight, or ask for fewer"
        )
    return taken


def _from_records(config: DataConfig) -> ExampleSets:
    """Read a file or dataset and hold some prompts out."""
    examples = _shuffled_records(config)
    if config.eval_file:
        held_out = read_jsonl(config.eval_file)
    else:
        # at most half; one example for each prompt, so that a prompt with two answers is not scored against both
        by_question = {example.question: example for example in examples}
        held_out = list(by_question.values())[: min(config.eval_examples, len(by_question) // 2)]
    questions = {example.question for example in held_out}
    train = [example for example in examples if example.question not in questions]
    if dropped := len(examples) - len(train) - (0 if config.eval_file else len(held_out)):
        logger.warning("%d training examples ask a held-out question; they are left out of training", dropped)
    train = train[: config.train_examples]
    if not train or not held_out:
        raise ConfigError(
            f"data: {len(examples)} examples give {len(train)} for training and {len(held_out)} held out, expected at"
            " least one of each: add examples with different prompts"
        )
    return ExampleSets(train=tuple(train), held_out=tuple(held_out))


def _shuffled_records(config: DataConfig) -> list[Example]:
    """Read all records of the file or dataset, in an order that depends on the seed alone."""
    examples = read_jsonl(config.file) if config.file else _read_dataset(config)
    random.Random(config.seed).shuffle(examples)
    return examples


def _read_dataset(config: DataConfig) -> list[Example]:
    """Read a `datasets` name or folder."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("data.dataset needs the package datasets: pip install 'moe-kit[eval]'") from error
    name = str(config.dataset)
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=config.dataset_split)
    except Exception as error:  # the library raises a dozen unrelated types here
        raise ConfigError(
            f"data.dataset: cannot load {name!r}, split {config.dataset_split!r}: {type(error).__name__}: {error}"
        ) from error
    examples = [_example_from_record(row, f"{name}[{i}]", task=Path(name).name) for i, row in enumerate(rows)]
    if not examples:
        raise ConfigError(f"data.dataset: {name!r}, split {config.dataset_split!r} is empty")
    return examples


def _example_from_record(record: Any, where: str, *, task: str) -> Example:
    """Turn one record into an example or raise with its place."""
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: got {type(record).__name__}, expected an object")
    if record.get("messages") is not None:
        messages = record["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise ConfigError(f"{where}: 'messages' must be a list of at least two messages")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ConfigError(f"{where}: messages[{i}] must have 'role' and 'content', both text")
            if message["role"] not in _ROLES:
                raise ConfigError(f"{where}: messages[{i}] has role {message['role']!r}, expected {', '.join(_ROLES)}")
        if messages[-1]["role"] != "assistant":
            raise ConfigError(f"{where}: the last message is from {messages[-1]['role']!r}, expected 'assistant'")
        prompt = tuple({"role": m["role"], "content": m["content"]} for m in messages[:-1])
        answer = messages[-1]["content"]
    else:
        missing = [key for key in ("prompt", "completion") if not isinstance(record.get(key), str)]
        if missing:
            raise ConfigError(
                f"{where}: no text in {' and '.join(map(repr, missing))}; expected 'messages', or 'prompt' and"
                f" 'completion'; got keys {sorted(map(str, record))}"
            )
        prompt, answer = ({"role": "user", "content": record["prompt"]},), record["completion"]
    if not answer.strip():
        raise ConfigError(f"{where}: the answer is empty")
    return Example(example_id=where, task=str(record.get("task", task)), messages=prompt, answer=answer)
