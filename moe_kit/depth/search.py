r"""Labels for supervised layer routers: a Monte Carlo tree search over execution paths, one tree a question.

A path says how often each layer runs, in order: a tuple of 0, 1 or 2. The root runs every layer once; an edit deletes
one or two consecutive entries of the path or doubles one layer. A child of node s is chosen by

    Q / v + c sqrt(ln V / v) - lambda |path| / L        (with probability epsilon at random)

and selection descends only through nodes whose every edit has been tried, so the root gets all its children before any
grandchild. A path is scored once for its question (memoised); the score, without length penalty, goes up the tree. The
label is the best path that scores no worse than the root: shortest, then fewest distinct layers.

Trees of several questions advance in lock-step, one path a row of one batch. Each tree has its own random numbers,
drawn from the seed and its question's id, so a tree finds in company what it finds alone, and after an interruption
what it would have found without.

Source: Dr.LLM, arXiv 2510.12773, section 4 and algorithm 1 (c = 1.8, lambda = 3, epsilon = 0.1, 50 simulations).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path as FilePath
from typing import Any

from moe_kit.errors import CheckpointError, ConfigError

Path = tuple[int, ...]
# (question index, path) of each row -> score of each row, in [0, 1]
Evaluate = Callable[[Sequence[tuple[int, Path]]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of the search."""

    simulations: int = 50
    """Selections of each tree, 1 or more; a path seen before costs no evaluation."""

    exploration: float = 1.8
    """c: weight of rarely tried children, 0 or more."""

    length_penalty: float = 3.0
    """lambda: weight of the path's length in selection, 0 or more."""

    random_child: float = 0.1
    """epsilon: probability of a random child while descending, in [0, 1]."""

    max_skips: int = 2
    """Consecutive layers that may be skipped at most, 1 or more."""

    repeats: bool = True
    """Whether a layer may run twice."""

    correct: float = 0.5
    """Score from which an answer counts as right, in (0, 1]."""

    stop: str = "improved"
    """`improved`: end a tree when a wrong root got a right path, or a right path shorter than the best was found;
    `never`: use every simulation."""

    batch_size: int = 8
    """Trees that advance together, 1 or more."""

    seed: int = 0
    """Seed of all random numbers."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        for name in ("simulations", "max_skips", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a whole number of at least 1.")
        for name in ("exploration", "length_penalty"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        if not 0 <= self.random_child <= 1:
            raise ConfigError(f"random_child is {self.random_child}, expected a value in [0, 1].")
        if not 0 < self.correct <= 1:
            raise ConfigError(f"correct is {self.correct}, expected a value in (0, 1].")
        if self.stop not in ("improved", "never"):
            raise ConfigError(f"stop is {self.stop!r}, expected 'improved' or 'never'.")


def edits(path: Path, routable: Sequence[int], config: SearchConfig) -> list[Path]:
    """Every path that one edit makes of a path.

    Args:
        path: how often each layer runs.
        routable: layers that may be skipped or repeated.
        config: limits.

    Returns:
        Distinct paths, in a fixed order: deletions of one entry, of two neighbours, doublings.

    Example:
        >>> edits((1, 1, 1), [1, 2], SearchConfig())
        [(1, 0, 1), (1, 1, 0), (1, 0, 0), (1, 2, 1), (1, 1, 2)]
    """
    free = set(routable)
    entries = [layer for layer, count in enumerate(path) for _ in range(count)]
    found: dict[Path, None] = {}

    def add(layers: Sequence[int], change: int) -> None:
        counts = list(path)
        for layer in layers:
            counts[layer] += change
        if _within_limits(counts, config):
            found[tuple(counts)] = None

    for layer in dict.fromkeys(entries):
        if layer in free:
            add([layer], -1)
    for pair in itertools.pairwise(entries):
        if free.issuperset(pair):
            add(pair, -1)
    for layer, count in enumerate(path):
        if config.repeats and count == 1 and layer in free:
            add([layer], 1)
    return list(found)


def _within_limits(counts: Sequence[int], config: SearchConfig) -> bool:
    run = 0
    for count in counts:
        run = run + 1 if count == 0 else 0
        if run > config.max_skips:
            return False
    return any(counts) and max(counts) <= 2


@dataclass(eq=False)
class Node:
    """A node of a search tree.

    Attributes:
        path: how often each layer runs.
        parent: the node it was edited from.
        untried: paths of edits that have no child yet, in random order.
        children: nodes of the edits tried.
        visits: how often the node or one below it was evaluated.
        total: sum of the scores of those evaluations.
    """

    path: Path
    parent: Node | None
    untried: list[Path]
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0


class Tree:
    """The search tree of one question.

    Args:
        question_id: distinct name of the question; its random numbers come from it.
        num_layers: L.
        routable: layers that may be skipped or repeated.
        config: settings.
        memory: scores of paths that are known already; filled as the search goes on.
    """

    def __init__(
        self,
        question_id: str,
        num_layers: int,
        routable: Sequence[int],
        config: SearchConfig,
        memory: dict[Path, float] | None = None,
    ) -> None:
        self.question_id, self.routable, self.config = question_id, tuple(routable), config
        self.memory = {} if memory is None else memory
        digest = hashlib.sha256(f"{config.seed}/{question_id}".encode()).digest()
        self.random = random.Random(int.from_bytes(digest[:8], "big"))
        self.root = self._node((1,) * num_layers, None)
        self.simulations = 0
        self.done = False
        self.best: Path | None = None
        self._seen: dict[Path, float] = {}
        self._pending: Node | None = None

    def _node(self, path: Path, parent: Node | None) -> Node:
        untried = edits(path, self.routable, self.config)
        self.random.shuffle(untried)
        return Node(path, parent, untried)

    def propose(self) -> Path | None:
        """Next path that must be evaluated, or None when the search is over.

        Simulations that end at a path whose score is known run through at once.
        """
        while not self.done:
            self._pending = self.root if not self.root.visits else self._expand(self._select())
            path = self._pending.path
            if path not in self.memory:
                return path
            self.learn(self.memory[path])
        return None

    def learn(self, score: float) -> None:
        """Take the score of the proposed path."""
        node = self._pending
        assert node is not None
        first = not self.root.visits
        self.memory[node.path] = score
        self._seen[node.path] = score
        better = self._improves(node.path, score)
        walk: Node | None = node
        while walk is not None:
            walk.visits += 1
            walk.total += score
            walk = walk.parent
        if not first:
            self.simulations += 1
        if better:
            self.best = node.path
        exhausted = not self.root.untried and not self.root.children
        stop = better and not first and self.config.stop == "improved"
        self.done = stop or exhausted or self.simulations >= self.config.simulations

    def _improves(self, path: Path, score: float) -> bool:
        """Right where the root was wrong, or right and ahead of the best path so far."""
        if score < self.config.correct:
            return False
        return self.best is None or _rank(path) < _rank(self.best)

    def _select(self) -> Node:
        """Descend to the first node with an untried edit, or to a leaf without any."""
        node = self.root
        while not node.untried and node.children:
            if self.random.random() < self.config.random_child:
                node = self.random.choice(node.children)
            else:
                node = max(node.children, key=lambda child, parent=node: self._value(child, parent))
        return node

    def _value(self, child: Node, parent: Node) -> float:
        explore = self.config.exploration * math.sqrt(math.log(parent.visits) / child.visits)
        return child.total / child.visits + explore - self.config.length_penalty * sum(child.path) / len(child.path)

    def _expand(self, node: Node) -> Node:
        if not node.untried:
            return node
        child = self._node(node.untried.pop(), node)
        node.children.append(child)
        return child

    def label(self) -> dict[str, Any]:
        """The result as plain values.

        Returns:
            `id`, `actions` (0 skip, 1 execute, 2 repeat for each layer), `root_score`, `score`, `layers` (applications
            in the path), `kept` (False if neither the root nor any path was right: no label to learn from),
            `simulations`, `evaluations`.
        """
        best = self.best if self.best is not None else self.root.path
        return {
            "id": self.question_id,
            "actions": list(best),
            "root_score": self.memory[self.root.path],
            "score": self.memory[best],
            "layers": sum(best),
            "kept": self.best is not None,
            "simulations": self.simulations,
            "evaluations": len(self._seen),
        }


def _rank(path: Path) -> tuple[int, int]:
    return sum(path), sum(count > 0 for count in path)


def random_chain(tree: Tree, evaluate: Callable[[Path], float]) -> dict[str, Any]:
    """The control: a chain of as many random edits, each made from the one before.

    Args:
        tree: a fresh tree, for its question, limits and random numbers.
        evaluate: score of a path.

    Returns:
        What `Tree.label` returns.
    """
    path = tree.root.path
    for step in range(tree.config.simulations + 1):
        if step:
            path = tree.random.choice(edits(path, tree.routable, tree.config))
        score = tree.memory[path] = evaluate(path)
        tree._seen[path] = score
        if tree._improves(path, score):
            tree.best = path
    tree.simulations = tree.config.simulations
    return tree.label()


def search_paths(
    question_ids: Sequence[str],
    evaluate: Evaluate,
    *,
    num_layers: int,
    routable: Sequence[int],
    config: SearchConfig | None = None,
    output: str | FilePath | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
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

    Returns:
        Labels in the order of the questions.

    Raises:
        ConfigError: if ids repeat or no layer is routable.
        CheckpointError: if `output` was written with other settings.
    """
    config = config or SearchConfig()
    if len(set(question_ids)) != len(question_ids):
        raise ConfigError("question ids repeat: each tree needs a name of its own.")
    if not routable or not all(0 <= layer < num_layers for layer in routable):
        raise ConfigError(f"routable is {list(routable)}, expected layers in [0, {num_layers - 1}], at least one.")
    log = _Log(output, {**asdict(config), "batch_size": 0, "num_layers": num_layers, "routable": sorted(routable)})
    labels = dict(log.labels)
    waiting = iter([index for index, name in enumerate(question_ids) if name not in labels])
    active: list[tuple[int, Tree]] = []
    try:
        while True:
            rows: list[tuple[int, Tree, Path]] = []
            active = [(index, tree) for index, tree in active if not tree.done]
            for index, tree in _refill(active, waiting, question_ids, num_layers, routable, config, log):
                path = tree.propose()
                if path is not None:
                    rows.append((index, tree, path))
                else:
                    labels[tree.question_id] = tree.label()
                    log.write_label(labels[tree.question_id])
                    if progress is not None:
                        progress(labels[tree.question_id])
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
                    labels[tree.question_id] = tree.label()
                    log.write_label(labels[tree.question_id])
                    if progress is not None:
                        progress(labels[tree.question_id])
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
    log: _Log,
) -> list[tuple[int, Tree]]:
    while len(active) < config.batch_size:
        index = next(waiting, None)
        if index is None:
            break
        name = question_ids[index]
        active.append((index, Tree(name, num_layers, routable, config, log.scores.setdefault(name, {}))))
    return active


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


class _Log:
    """Labels and evaluations on disk; a line cut short by an interruption is dropped."""

    def __init__(self, output: str | FilePath | None, settings: dict[str, Any]) -> None:
        self.labels: dict[str, dict[str, Any]] = {}
        self.scores: dict[str, dict[Path, float]] = {}
        self.path = None if output is None else FilePath(output)
        self._files: list[Any] = []
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        evaluations = self.path.with_name(self.path.name + ".evaluations")
        settings = json.loads(json.dumps(settings))
        lines = _complete_lines(evaluations)
        if lines and lines[0].get("settings") != settings:
            raise CheckpointError(
                f"{self.path} was searched with {lines[0].get('settings')}, now asked for {settings}: use another output "
                "or remove the old one."
            )
        for line in lines[1:]:
            self.scores.setdefault(line["id"], {})[tuple(line["actions"])] = line["score"]
        self.labels = {line["id"]: line for line in _complete_lines(self.path)} if lines else {}
        self._files = [evaluations.open("a"), self.path.open("a" if lines else "w")]
        if not lines:
            self._write(0, {"settings": settings})

    def _write(self, which: int, value: dict[str, Any]) -> None:
        if self._files:
            self._files[which].write(json.dumps(value) + "\n")
            self._files[which].flush()

    def write_score(self, name: str, path: Path, score: float) -> None:
        self._write(0, {"id": name, "actions": list(path), "score": score})

    def write_label(self, label: dict[str, Any]) -> None:
        self._write(1, label)

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []

    def finish(self, labels: Sequence[dict[str, Any]], num_layers: int) -> None:
        if self.path is None:
            return
        # in the order of the questions, whatever order the trees ended in
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text("".join(json.dumps(label) + "\n" for label in labels))
        temporary.replace(self.path)
        summary = json.dumps(statistics(labels, num_layers), indent=2)
        self.path.with_name(self.path.name + ".stats.json").write_text(summary + "\n")


def _complete_lines(path: FilePath) -> list[dict[str, Any]]:
    """Parsed lines of a JSONL file; a torn last line is cut off the file."""
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
    labels = [label for label in _complete_lines(FilePath(path)) if label.get("kept")]
    if not labels:
        raise CheckpointError(
            f"{path} holds no usable labels: run the search first, on questions the model can answer."
        )
    return labels
