"""The label search: a real tree, batched in lock-step, resumable, better than a chain of random edits."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kit import CheckpointError, ConfigError
from moe_kit.depth.search import SearchConfig, Tree, edits, random_chain, read_labels, search_paths

LAYERS = 6
ROUTABLE = range(1, LAYERS)
GOAL = (1, 0, 2, 1, 0, 1)


def closeness(path, goal=GOAL):
    """Right only near a planted path: 1 at the goal, less with each layer that differs."""
    return max(0.0, 1.0 - 0.2 * sum(a != b for a, b in zip(path, goal)))


def run(tree, score):
    while (path := tree.propose()) is not None:
        tree.learn(score(path))
    return tree


def walk(node):
    yield node
    for child in node.children:
        yield from walk(child)


@given(seed=st.integers(0, 999), repeats=st.booleans(), max_skips=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_every_node_keeps_the_limits(seed, repeats, max_skips):
    config = SearchConfig(simulations=80, seed=seed, stop="never", repeats=repeats, max_skips=max_skips)
    tree = run(Tree("q", LAYERS, ROUTABLE, config), closeness)
    for node in walk(tree.root):
        assert node.path[0] == 1
        assert max(node.path) <= (2 if repeats else 1)
        assert sum(node.path) <= 2 * LAYERS
        skips = "".join("0" if count == 0 else "x" for count in node.path)
        assert "0" * (max_skips + 1) not in skips
        assert node.visits == (node is tree.root) + sum(child.visits for child in node.children) + _own(node, tree)
        if node.parent is not None:
            assert node.path in edits(node.parent.path, ROUTABLE, config)


def _own(node, tree):
    below = sum(child.visits for child in node.children)
    return 0 if node is tree.root else node.visits - below


def test_descends_only_through_fully_expanded_nodes():
    tree = run(Tree("q", LAYERS, ROUTABLE, SearchConfig(simulations=150, stop="never")), closeness)
    assert len(tree.root.children) == len(edits(tree.root.path, ROUTABLE, tree.config)) > 10
    deeper = [node for node in walk(tree.root) if node.children]
    assert len(deeper) > 2
    assert all(not node.untried for node in deeper if any(child.children for child in node.children))
    few = run(Tree("q", LAYERS, ROUTABLE, SearchConfig(simulations=5, stop="never")), closeness)
    assert len(few.root.children) == 5
    assert all(not child.children for child in few.root.children)


def test_a_path_is_evaluated_once():
    asked = []
    tree = Tree("q", LAYERS, ROUTABLE, SearchConfig(simulations=300, stop="never"))
    run(tree, lambda path: asked.append(path) or closeness(path))
    assert len(asked) == len(set(asked)) < tree.simulations
    assert tree.simulations == 300


def test_stops_where_the_method_says():
    def wrong_root(path):
        return 0.0 if path == (1,) * LAYERS else 1.0

    tree = run(Tree("q", LAYERS, ROUTABLE, SearchConfig()), wrong_root)
    assert tree.simulations == 1
    assert tree.label()["kept"]
    right = run(Tree("q", LAYERS, ROUTABLE, SearchConfig()), lambda path: 1.0)
    assert sum(right.best) < LAYERS
    hopeless = run(Tree("q", LAYERS, ROUTABLE, SearchConfig(simulations=9)), lambda path: 0.0)
    assert hopeless.simulations == 9
    assert not hopeless.label()["kept"]
    assert hopeless.label()["actions"] == [1] * LAYERS


@pytest.mark.parametrize(("tolerance", "layers"), [(0.0, LAYERS), (0.1, LAYERS - 1), (0.4, LAYERS - 2)])
def test_a_label_is_not_worse_than_a_right_root(tolerance, layers):
    # a graded scorer: every layer left out costs a tenth, and all of it still counts as right
    config = SearchConfig(simulations=60, stop="never", correct=0.5, tolerance=tolerance, max_skips=1)
    label = run(Tree("q", LAYERS, ROUTABLE, config), lambda path: 0.9 - 0.1 * sum(c == 0 for c in path)).label()
    assert label["kept"]
    assert label["layers"] <= layers
    assert label["score"] >= round(0.9 - tolerance, 4)
    assert (label["layers"] == LAYERS) == (tolerance == 0.0)
    # a wrong root sets no floor
    wrong = run(Tree("q", LAYERS, ROUTABLE, config), lambda path: 0.6 if 0 in path else 0.45).label()
    assert (wrong["score"], wrong["root_score"]) == (0.6, 0.45)


def test_finds_a_planted_optimum_that_a_chain_of_random_edits_does_not():
    config = dict(simulations=250, stop="never", correct=0.99, length_penalty=0.3, exploration=0.3)
    found = {"tree": 0, "chain": 0}
    for seed in range(12):
        settings_ = SearchConfig(seed=seed, **config)
        found["tree"] += run(Tree("q", LAYERS, ROUTABLE, settings_), closeness).best == GOAL
        chain = random_chain(Tree("q", LAYERS, ROUTABLE, settings_), closeness)
        found["chain"] += tuple(chain["actions"]) == GOAL
    assert found["tree"] >= 10
    assert found["tree"] >= found["chain"] + 4


GOALS = [(1, 0, 1, 1, 2, 1), (1, 1, 1, 0, 0, 1), (1, 2, 1, 1, 1, 0), (1, 1, 0, 1, 1, 1)] * 3
IDS = [f"q{index}" for index in range(len(GOALS))]


def batched(rows, log=None):
    if log is not None:
        log.append(rows)
    return [closeness(path, GOALS[index]) for index, path in rows]


def labels(output=None, evaluate=batched, digests=None, source=None, **overrides):
    config = SearchConfig(**{"simulations": 60, "stop": "never", "correct": 0.7, **overrides})
    about = dict(num_layers=LAYERS, routable=ROUTABLE, digests=digests, source=source)
    return search_paths(IDS, evaluate, config=config, output=output, **about)


def test_lock_step_finds_what_trees_find_alone():
    batches = []
    together = labels(evaluate=lambda rows: batched(rows, batches), batch_size=8)
    assert together == labels(batch_size=1)
    assert max(map(len, batches)) == 8
    assert all(len({index for index, _ in rows}) == len(rows) for rows in batches)
    assert sum(map(len, batches)) == sum(label["evaluations"] for label in together)


@pytest.mark.parametrize("after", [1, 20, 47])
def test_killed_and_resumed_gives_the_same_labels(tmp_path, after):
    expected = labels(tmp_path / "whole.jsonl")
    calls, rows_seen = [0], []

    def dying(rows):
        calls[0] += 1
        if calls[0] == after:
            raise KeyboardInterrupt
        rows_seen.extend(rows)
        return batched(rows)

    with pytest.raises(KeyboardInterrupt):
        labels(tmp_path / "cut.jsonl", evaluate=dying)
    # a write that was cut short
    with (tmp_path / "cut.jsonl.evaluations").open("a") as file:
        file.write('{"id": "q0", "acti')
    again = []
    resumed = labels(tmp_path / "cut.jsonl", evaluate=lambda rows: again.extend(rows) or batched(rows))
    assert resumed == expected
    assert not set(again) & set(rows_seen), "a known path was evaluated again"
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    stats = json.loads((tmp_path / "cut.jsonl.stats.json").read_text())
    assert stats["questions"] == len(IDS)
    assert sum(stats["class_counts"]) == stats["kept"] * LAYERS
    assert len(read_labels(tmp_path / "cut.jsonl")) == stats["kept"]


def test_other_settings_and_bad_input_are_refused(tmp_path):
    labels(tmp_path / "a.jsonl")
    with pytest.raises(CheckpointError, match="was searched with"):
        labels(tmp_path / "a.jsonl", seed=1)
    labels(tmp_path / "a.jsonl", batch_size=3)
    with pytest.raises(ConfigError, match="ids repeat"):
        search_paths(["a", "a"], batched, num_layers=3, routable=[1])
    with pytest.raises(ConfigError, match="at least one"):
        search_paths(["a"], batched, num_layers=3, routable=[])
    with pytest.raises(ConfigError, match="simulations is 0"):
        SearchConfig(simulations=0)
    with pytest.raises(CheckpointError, match="no usable labels"):
        read_labels(tmp_path / "none.jsonl")


def test_other_questions_scorers_and_models_are_told_apart(tmp_path):
    source = {"model": "tiny", "scorer": "exact"}
    path, digests = tmp_path / "a.jsonl", [f"d{name}" for name in IDS]
    found = labels(path, digests=digests, source=source)
    assert [label["digest"] for label in found] == digests
    assert labels(path, digests=digests, source=source) == found
    for other in (dict(source, scorer="likelihood"), dict(source, model="other"), None):
        with pytest.raises(CheckpointError, match="was searched with"):
            labels(path, digests=digests, source=other)
    with pytest.raises(CheckpointError, match=f"other questions of the same names: 1, {IDS[1]} say"):
        labels(path, digests=[digests[0], "new", *digests[2:]], source=source)
    with pytest.raises(ConfigError, match="digests were given"):
        labels(tmp_path / "b.jsonl", digests=digests[:1])


def test_a_search_that_was_cut_off_knows_what_it_was_about(tmp_path):
    path, digests = tmp_path / "a.jsonl", [f"d{name}" for name in IDS]

    def dying(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labels(path, digests=digests, evaluate=dying)
    with pytest.raises(CheckpointError, match="other questions"):
        labels(path, digests=["new", *digests[1:]])
    assert len(labels(path, digests=digests)) == len(IDS)
