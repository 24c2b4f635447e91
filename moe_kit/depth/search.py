"""Labels for supervised layer routers: a Monte Carlo tree search over execution paths, one tree a question.

Trees (`moe_kit.depth.search_tree`) of several questions advance in lock-step, one path a row of one batch. Each tree has
its own random numbers, drawn from the seed and its question's id, so a tree finds in company what it finds alone, and
after an interruption what it would have found without.

Source: Dr.LLM, arXiv 2510.12773, section 4 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Any

from moe_kit.depth.search_log import SearchLog, read_labels, statistics
from moe_kit.depth.search_tree import Path, SearchConfig, Tree, edits, random_chain
from moe_kit.errors import ConfigError

__all__ = ["SearchConfig", "Tree", "edits", "random_chain", "read_labels", "search_paths", "statistics"]

# (question index, path) of each row -> score of each row, in [0, 1]
Evaluate = Callable[[Sequence[tuple[int, Path]]], Sequence[float]]


def search_paths(
    question_ids: Sequence[str],
    evaluate: Evaluate,
    *,
    num_layers: int,
    routable: Sequence[int],
    config: SearchConfig | None = None,
    output: str | FilePath | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    digests: Sequence[str] | None = None,
    source: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Search the labels of several questions in lock-step.

    Args:
        question_ids: distinct names.
        evaluate: scores rows of (question index, path), each in [0, 1]. Scores are rounded to 1e-4, so that the last
            bits of a batched forward pass cannot send a tree another way.
        num_layers: L.
        routable: layers that may be skipped or repeated.
        config: settings.
        output: JSONL file of labels; written as trees end and taken up again if it exists. Every evaluation is kept
            beside it, in `<output>.evaluations`, so that a resumed search repeats none; `<output>.stats.json` gets
            the statistics.
        progress: called with each label.
        digests: what tells each question from another of the same name; kept with its label.
        source: what else the scores depend on, such as the model and the scorer: plain values.

    Returns:
        Labels in the order of the questions.

    Raises:
        ConfigError: if ids repeat, digests are not one a question, or no layer is routable.
        CheckpointError: if `output` was written with other settings, from another source, or about other questions.
    """
    config = config or SearchConfig()
    if len(set(question_ids)) != len(question_ids):
        raise ConfigError("question ids repeat: each tree needs a name of its own.")
    if digests is not None and len(digests) != len(question_ids):
        raise ConfigError(f"{len(digests)} digests were given for {len(question_ids)} questions.")
    if not routable or not all(0 <= layer < num_layers for layer in routable):
        raise ConfigError(f"routable is {list(routable)}, expected layers in [0, {num_layers - 1}], at least one.")
    asked = {**asdict(config), "batch_size": 0, "num_layers": num_layers, "routable": sorted(routable)}
    known = {} if digests is None else dict(zip(question_ids, digests))
    log = SearchLog(output, {**asked, "source": source}, known)
    labels = dict(log.labels)
    waiting = iter([index for index, name in enumerate(question_ids) if name not in labels])
    active: list[tuple[int, Tree]] = []

    def end(tree: Tree) -> None:
        digest = {} if digests is None else {"digest": known[tree.question_id]}
        label = labels[tree.question_id] = {**tree.label(), **digest}
        log.write_label(label)
        if progress is not None:
            progress(label)

    try:
        while True:
            rows: list[tuple[int, Tree, Path]] = []
            active = [(index, tree) for index, tree in active if not tree.done]
            for index, tree in _refill(active, waiting, question_ids, num_layers, routable, config, log):
                path = tree.propose()
                if path is not None:
                    rows.append((index, tree, path))
                else:
                    end(tree)
            if not rows:
                if not active:
                    break
                continue
            scores = evaluate([(index, path) for index, _, path in rows])
            for (_, tree, path), score in zip(rows, scores, strict=True):
                score = round(float(score), 4)
                log.write_score(tree.question_id, path, score)
                tree.learn(score)
                if tree.done:
                    end(tree)
    finally:
        log.close()
    ordered = [labels[name] for name in question_ids]
    log.finish(ordered, num_layers)
    return ordered


def _refill(
    active: list[tuple[int, Tree]],
    waiting: Iterator[int],
    question_ids: Sequence[str],
    num_layers: int,
    routable: Sequence[int],
    config: SearchConfig,
    log: SearchLog,
) -> list[tuple[int, Tree]]:
    while len(active) < config.batch_size:
        index = next(waiting, None)
        if index is None:
            break
        name = question_ids[index]
        active.append((index, Tree(name, num_layers, routable, config, log.begin(name))))
    return active
