"""What a search keeps on disk: every evaluation and every label, so that a killed search goes on where it stopped.

Labels are JSONL, one object a question; evaluations lie beside them in `<output>.evaluations`, whose first line holds the
settings, and which names each question's digest before its first evaluation; `<output>.stats.json` sums the labels up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from moe_kit.depth.search_tree import Path
from moe_kit.errors import CheckpointError


def statistics(labels: Sequence[dict[str, Any]], num_layers: int) -> dict[str, Any]:
    """Statistics of labels: how many are usable, what they save, and how the classes are spread.

    Args:
        labels: what `search_paths` returned.
        num_layers: L.

    Returns:
        Plain values; `class_counts` are those of skip, execute, repeat over the kept labels.
    """
    kept = [label for label in labels if label["kept"]]
    flat = [action for label in kept for action in label["actions"]]
    return {
        "questions": len(labels),
        "kept": len(kept),
        "root_right": sum(label["kept"] and label["root_score"] >= label["score"] for label in labels),
        "wrong_to_right": sum(label["kept"] and label["root_score"] < label["score"] for label in labels),
        "mean_layers": sum(label["layers"] for label in kept) / len(kept) if kept else None,
        "num_layers": num_layers,
        "class_counts": [flat.count(action) for action in range(3)],
        "evaluations": sum(label["evaluations"] for label in labels),
    }


class SearchLog:
    """Labels and evaluations on disk; a line cut short by an interruption is dropped.

    Args:
        output: JSONL file of labels; None keeps nothing.
        settings: what the search was asked for; a log of other settings is not continued.
        digests: question -> what tells it from another of the same name.

    Attributes:
        labels: question -> its label, of trees that ended.
        scores: question -> path -> score.

    Raises:
        CheckpointError: if the file was written with other settings, about other questions, or is damaged.
    """

    def __init__(
        self, output: str | FilePath | None, settings: dict[str, Any], digests: Mapping[str, str] | None = None
    ) -> None:
        self.digests = digests or {}
        self.labels: dict[str, dict[str, Any]] = {}
        self.scores: dict[str, dict[Path, float]] = {}
        self.path = None if output is None else FilePath(output)
        self._files: list[Any] = []
        self._begun: set[str] = set()
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        evaluations = self.path.with_name(self.path.name + ".evaluations")
        settings = json.loads(json.dumps(settings))
        lines = complete_lines(evaluations)
        if lines and lines[0].get("settings") != settings:
            raise CheckpointError(
                f"{self.path} was searched with {lines[0].get('settings')}, now asked for {settings}: use another output "
                "or remove the old one."
            )
        begun = {line["id"]: line["digest"] for line in lines[1:] if "digest" in line}
        other = [name for name, digest in self.digests.items() if begun.get(name, digest) != digest]
        if other:
            raise CheckpointError(
                f"{self.path} was searched for other questions of the same names: {len(other)}, {other[0]} say. Use another "
                "output, or remove the old one."
            )
        for line in lines[1:]:
            if "score" in line:
                self.scores.setdefault(line["id"], {})[tuple(line["actions"])] = line["score"]
        self._begun = set(begun)
        self.labels = {line["id"]: line for line in complete_lines(self.path)} if lines else {}
        self._files = [evaluations.open("a"), self.path.open("a" if lines else "w")]
        if not lines:
            self._write(0, {"settings": settings})

    def _write(self, which: int, value: dict[str, Any]) -> None:
        if self._files:
            self._files[which].write(json.dumps(value) + "\n")
            self._files[which].flush()

    def begin(self, name: str) -> dict[Path, float]:
        """The known scores of a question, which is noted before its first evaluation.

        Args:
            name: the question.

        Returns:
            Path -> score; to be added to.
        """
        if name in self.digests and name not in self._begun:
            self._begun.add(name)
            self._write(0, {"id": name, "digest": self.digests[name]})
        return self.scores.setdefault(name, {})

    def write_score(self, name: str, path: Path, score: float) -> None:
        """Keep an evaluation.

        Args:
            name: the question.
            path: what was evaluated.
            score: its score.
        """
        self._write(0, {"id": name, "actions": list(path), "score": score})

    def write_label(self, label: dict[str, Any]) -> None:
        """Keep the label of a tree that ended."""
        self._write(1, label)

    def close(self) -> None:
        """Close the files; nothing is kept from then on."""
        for file in self._files:
            file.close()
        self._files = []

    def finish(self, labels: Sequence[dict[str, Any]], num_layers: int) -> None:
        """Put the labels into the order of the questions, whatever order the trees ended in, and sum them up.

        Args:
            labels: all of them.
            num_layers: L.
        """
        if self.path is None:
            return
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text("".join(json.dumps(label) + "\n" for label in labels))
        temporary.replace(self.path)
        summary = json.dumps(statistics(labels, num_layers), indent=2)
        self.path.with_name(self.path.name + ".stats.json").write_text(summary + "\n")


def complete_lines(path: FilePath) -> list[dict[str, Any]]:
    """Parsed lines of a JSONL file; a torn last line is cut off the file.

    Args:
        path: the file, which need not exist.

    Returns:
        One object a line.

    Raises:
        CheckpointError: if a whole line is no JSON.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        path.write_bytes(whole)
    try:
        return [json.loads(line) for line in whole.decode().splitlines()]
    except ValueError as error:
        raise CheckpointError(f"{path} holds a line that is no JSON ({error}): remove it to search anew.") from error


def read_labels(path: str | FilePath) -> list[dict[str, Any]]:
    """Read the labels of a search, those without a usable path left out.

    Args:
        path: JSONL file that `search_paths` wrote.

    Returns:
        Labels in file order.

    Raises:
        CheckpointError: if the file is missing or damaged, or holds no usable label.
    """
    labels = [label for label in complete_lines(FilePath(path)) if label.get("kept")]
    if not labels:
        raise CheckpointError(
            f"{path} holds no usable labels: run the search first, on questions the model can answer."
        )
    return labels
