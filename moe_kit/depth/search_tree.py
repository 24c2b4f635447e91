r"""The search tree of one question, and the edits that make one path of another.

A path says how often each layer runs, in order: a tuple of 0, 1 or 2. The root runs every layer once; an edit deletes
one or two consecutive entries of the path or doubles one layer. A child of node s is chosen by

    Q / v + c sqrt(ln V / v) - lambda |path| / L        (with probability epsilon at random)

and selection descends only through nodes whose every edit has been tried, so the root gets all its children before any
grandchild. A path is scored once for its question (memoised); the score, without length penalty, goes up the tree. The
label is the best path that is right and scores no worse than a right root: shortest, then fewest distinct layers.

Source: Dr.LLM, arXiv 2510.12773, section 4 and algorithm 1 (c = 1.8, lambda = 3, epsilon = 0.1, 50 simulations).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_kit.errors import ConfigError

Path = tuple[int, ...]


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

    tolerance: float = 0.0
    """How far below the score of a right root a path may be and still become the label, 0 or more: for graded scorers."""

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
        for name in ("exploration", "length_penalty", "tolerance"):
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
        """Right, no worse than a right root, and ahead of the best path so far."""
        root, least = self.memory[self.root.path], self.config.correct
        if root >= least:
            # scores are kept with four decimals
            least = max(least, round(root - self.config.tolerance, 4))
        if score < least:
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
