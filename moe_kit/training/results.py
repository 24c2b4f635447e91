"""What a run reports: one row a task, as a table in the terminal and as JSON beside the adapter.

    task | zero-shot | best constant answer | plain LoRA | this run | gain over the constant

Everything is exact-match accuracy in percent with its standard error; the gain is measured above the constant answer,
since that much needs no reading of the question.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.evaluation.scores import Score, mean_score
from moe_kit.hf.adapter_files import flush

__all__ = ["Results", "read_results", "results_table", "stored_scores", "write_atomically", "write_results"]


@dataclass(kw_only=True)
class Results:
    """Scores and costs of one run."""

    name: str
    """Preset that was trained."""

    ours: dict[str, Score]
    """Task -> score after training."""

    constants: dict[str, tuple[str, Score]]
    """Task -> best constant answer and its score."""

    zero_shot: dict[str, Score] = field(default_factory=dict)
    """Task -> score of the base model; empty when it was not evaluated."""

    lora: dict[str, Score] = field(default_factory=dict)
    """Task -> score of plain LoRA; empty when there is none."""

    lora_note: str = ""
    """Where the LoRA row comes from."""

    details: dict[str, Any] = field(default_factory=dict)
    """Steps, seconds, tokens, parameters, versions, likelihoods."""

    @property
    def mean_gain(self) -> float:
        """Mean over tasks of accuracy minus the constant answer's accuracy, in points."""
        constants = {task: score for task, (_, score) in self.constants.items()}
        return 100 * (mean_score(self.ours).accuracy - mean_score(constants).accuracy)


def results_table(results: Results) -> Table:
    """Lay results out for a terminal.

    Args:
        results: Scores of one run.

    Returns:
        A rich table with a row for each task and one for their mean.
    """
    constants = {task: score for task, (_, score) in results.constants.items()}
    # answers, notes and names of tasks are text of others, not markup
    answers = ", ".join(f"{answer[:8]!r} ({task})" for task, (answer, _) in results.constants.items())
    notes = [f"best constant answers: {answers}", *([f"LoRA: {results.lora_note}"] if results.lora_note else [])]
    table = Table(
        title="Exact match on held-out questions, % ± standard error; gain over the constant, points",
        title_justify="left",
        caption=escape("\n".join(notes)),
        caption_justify="left",
    )
    table.add_column("task", overflow="fold")
    # in a narrow terminal the widest columns give way first, titles and names of tasks; nothing is cut
    score: Any = dict(justify="right", overflow="fold")
    if results.zero_shot:
        table.add_column("zero-shot", **score)
    table.add_column("best constant", **score)
    if results.lora:
        table.add_column("LoRA", **score)
    table.add_column(escape(results.name), style="bold", **score)
    table.add_column("gain", **score)

    def cells(task: str | None) -> list[str]:
        def pick(scores: Mapping[str, Score]) -> Score | None:
            if task is not None:
                return scores.get(task)
            return mean_score(scores) if set(scores) >= set(results.ours) else None

        row = [str(pick(results.zero_shot) or "-")] if results.zero_shot else []
        row.append(str(pick(constants)))
        row += [str(pick(results.lora) or "-")] if results.lora else []
        ours, base = pick(results.ours), pick(constants)
        assert ours, "a row stands for a task that was scored"
        assert base, "every scored task has a constant answer"
        return [*row, str(ours), f"{100 * (ours.accuracy - base.accuracy):+.1f}"]

    for task in results.ours:
        table.add_row(escape(task), *cells(task))
    table.add_section()
    table.add_row("mean", *cells(None))
    return table


def stored_scores(row: Mapping[str, Any]) -> tuple[dict[str, Score], str]:
    """Read the stored LoRA row of a recipe.

    Args:
        row: Task -> [accuracy, standard error] in percent, and optionally `note`.

    Returns:
        Task -> score, and the note.

    Raises:
        ConfigError: An entry is not a pair of numbers.
    """
    scores = {}
    for task, pair in row.items():
        if task == "note":
            continue
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(v, (int, float)) for v in pair):
            raise ConfigError(f"eval.compare_row.{task}: got {pair!r}, expected [accuracy, standard error] in percent")
        scores[task] = Score(accuracy=pair[0] / 100, stderr=pair[1] / 100, count=0)
    return scores, str(row.get("note", "stored"))


def write_results(results: Results, path: str | Path) -> None:
    """Write results as JSON, whole or not at all.

    Args:
        results: Scores of one run.
        path: The file.

    Raises:
        CheckpointError: The file cannot be written.
    """
    values = {**dataclasses.asdict(results), "mean_gain_points": results.mean_gain}
    write_atomically(Path(path), json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_results(path: str | Path) -> Results:
    """Read what `write_results` wrote.

    Args:
        path: The file.

    Returns:
        The results.

    Raises:
        CheckpointError: The file is missing or is not such a file.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        for name in ("ours", "zero_shot", "lora"):
            values[name] = {task: Score(**score) for task, score in values[name].items()}
        values["constants"] = {task: (answer, Score(**score)) for task, (answer, score) in values["constants"].items()}
        return Results(**{f.name: values[f.name] for f in dataclasses.fields(Results)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a results file of `moe-kit train`: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a text file by writing a neighbour and renaming it.

    Args:
        path: The file.
        text: Its content.

    Raises:
        CheckpointError: The folder is missing, full or read-only; an older file is left as it was.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        scratch.write_text(text, encoding="utf-8")
        flush(scratch)
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}. Make room or choose another --output_dir.") from error
