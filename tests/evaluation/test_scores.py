"""Accuracy, standard errors and the constant baseline against hand-made cases."""

import math

import pytest

from moe_kit.evaluation.scores import Score, best_constants, mean_score, score_answers
from moe_kit.training.data import Example, load_examples
from moe_kit.training.recipe import DataConfig, TaskConfig


def example(task, answer, index=0):
    return Example(
        example_id=f"{task}/{index}", task=task, messages=({"role": "user", "content": f"q{index}"},), answer=answer
    )


def test_accuracy_and_standard_error_by_task():
    examples = [example("a", "1"), example("b", "x"), example("a", "2"), example("a", "3"), example("a", "4")]
    scores = score_answers(examples, ["1", "y", " 2 ", "3.0", ""], {})
    assert list(scores) == ["a", "b"]
    assert scores["a"].accuracy == 0.5
    assert scores["a"].stderr == pytest.approx(math.sqrt(0.25 / 4))
    assert (scores["b"].accuracy, scores["b"].stderr, scores["b"].count) == (0.0, 0.0, 1)


def test_partial_credit_of_a_scorer_is_not_right():
    # reasoning-gym gives len(oracle) / len(answer) to an answer that merely contains the right one
    sets = load_examples(DataConfig(tasks=(TaskConfig(name="chain_sum"),), eval_examples=3), train_examples=1)
    right = [e.answer for e in sets.held_out]
    assert score_answers(sets.held_out, right, sets.scorers)["chain_sum"].accuracy == 1.0
    wordy = [f"The answer is {a}" for a in right]
    assert score_answers(sets.held_out, wordy, sets.scorers)["chain_sum"].accuracy == 0.0


def test_lengths_must_agree():
    with pytest.raises(ValueError):
        score_answers([example("a", "1")], [], {})


def test_best_constant_comes_from_training_and_is_scored_on_held_out():
    train = [example("a", x) for x in ("7", "8", "8", "7", "9")] + [example("b", "yes")]
    held_out = [example("a", x) for x in ("9", "9", "7", "1")] + [example("c", "z")]
    best = best_constants(train, held_out, {})
    # a tie between 7 and 8 goes to the one that sorts first; 9, the best on held-out, is not picked by peeking
    assert best["a"][0] == "7"
    assert best["a"][1].accuracy == 0.25
    assert best["c"] == ("", Score(accuracy=0.0, stderr=0.0, count=1))


def test_tasks_weigh_equally_in_the_mean():
    scores = {
        "a": Score(accuracy=1.0, stderr=0.3, count=10),
        "b": Score(accuracy=0.0, stderr=0.4, count=1000),
    }
    mean = mean_score(scores)
    assert (mean.accuracy, mean.count) == (0.5, 1010)
    assert mean.stderr == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no tasks"):
        mean_score({})
