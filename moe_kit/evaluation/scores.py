r"""Accuracy by task with standard errors, and the best constant answer.

An answer counts as right when the task's scorer gives it full marks: accuracy a = (1/n) sum_i [score_i >= 1], with
standard error sqrt(a (1 - a) / n). The mean over T tasks weighs tasks equally: its standard error is
(1/T) sqrt(sum_t se_t^2).

The best constant answer says what a model can reach without reading the question: the most frequent training answer,
scored on the held-out examples like any other answer. A gain is worth reporting above this, not above zero.

Not here: how answers are made (`moe_kit.evaluation.generation`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_kit.training.data import Example

__all__ = ["Score", "best_constants", "mean_score", "score_answers", "score_one"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """An accuracy with its standard error."""

    accuracy: float
    """Share of answers with full marks, in [0, 1]."""

    stderr: float
    """Standard error of `accuracy`."""

    count: int
    """Number of examples."""

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ± {100 * self.stderr:.1f}"


def score_one(example: Example, answer: str, scorers: Mapping[str, Any]) -> float:
    """Score one answer.

    Args:
        example: The example that was asked.
        answer: The answer given.
        scorers: Task -> `score_answer(answer, entry)`; a task without one is scored by equality, spaces aside.

    Returns:
        A score in [0, 1]; 1 is full marks.
    """
    scorer = scorers.get(example.task)
    if scorer is None or example.entry is None:
        return float(" ".join(answer.split()) == " ".join(example.answer.split()))
    return float(scorer(answer, example.entry))


def score_answers(examples: Sequence[Example], answers: Sequence[str], scorers: Mapping[str, Any]) -> dict[str, Score]:
    """Score answers by task.

    Args:
        examples: What was asked.
        answers: One answer for each example.
        scorers: As for `score_one`.

    Returns:
        Task -> score, in the order in which tasks first appear.

    Raises:
        ValueError: The two sequences differ in length.
    """
    right: dict[str, list[bool]] = {}
    for example, answer in zip(examples, answers, strict=True):
        right.setdefault(example.task, []).append(score_one(example, answer, scorers) >= 1.0)
    return {task: _score(marks) for task, marks in right.items()}


def best_constants(
    train: Sequence[Example], held_out: Sequence[Example], scorers: Mapping[str, Any]
) -> dict[str, tuple[str, Score]]:
    """Score the most frequent training answer of each task on the held-out examples.

    Args:
        train: Training examples; their answers are the candidates.
        held_out: Held-out examples.
        scorers: As for `score_one`.

    Returns:
        Task -> (answer, score). A tie goes to the answer that sorts first. A task that training lacks gets an empty
        answer.
    """
    counts: dict[str, Counter[str]] = {}
    for example in train:
        counts.setdefault(example.task, Counter())[example.answer] += 1
    best = {}
    for task, count in counts.items():
        best[task] = min(count, key=lambda answer: (-count[answer], answer))
    answers = [best.get(example.task, "") for example in held_out]
    return {task: (best.get(task, ""), score) for task, score in score_answers(held_out, answers, scorers).items()}


def mean_score(scores: Mapping[str, Score]) -> Score:
    """Average tasks with equal weight.

    Args:
        scores: Task -> score; at least one.

    Returns:
        The mean accuracy, its standard error, and the number of examples of all tasks together.

    Raises:
        ValueError: There are no tasks.
    """
    if not scores:
        raise ValueError("mean_score: got no tasks, expected at least one")
    tasks = len(scores)
    return Score(
        accuracy=sum(s.accuracy for s in scores.values()) / tasks,
        stderr=math.sqrt(sum(s.stderr**2 for s in scores.values())) / tasks,
        count=sum(s.count for s in scores.values()),
    )


def _score(marks: Sequence[bool]) -> Score:
    """Turn marks into an accuracy with its binomial standard error."""
    accuracy = sum(marks) / len(marks)
    return Score(accuracy=accuracy, stderr=math.sqrt(accuracy * (1 - accuracy) / len(marks)), count=len(marks))
