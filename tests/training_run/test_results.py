"""The results table and its file."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.evaluation.scores import Score, mean_score
from moe_kit.training.recipe import load_recipe
from moe_kit.training.results import (
    Results,
    read_results,
    results_table,
    stored_scores,
    write_atomically,
    write_results,
)

RESULTS = Results(
    name="mixture_of_lora",
    ours={"a": Score(accuracy=0.75, stderr=0.04, count=100), "b": Score(accuracy=0.5, stderr=0.03, count=100)},
    constants={
        "a": ("4", Score(accuracy=0.05, stderr=0.02, count=100)),
        "b": ("x", Score(accuracy=0.0, stderr=0.0, count=100)),
    },
    lora={"a": Score(accuracy=0.7, stderr=0.05, count=100)},
    lora_note="stored",
    details={"steps": 3},
)


def render(results, width=120):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results_table(results))
    return console.export_text()


def test_gain_is_above_the_constant():
    assert RESULTS.mean_gain == pytest.approx(60.0)
    text = render(RESULTS)
    assert "+70.0" in text
    assert "+60.0" in text
    assert "best constant answers: '4' (a), 'x' (b)" in text
    assert "LoRA: stored" in text
    assert "zero-shot" not in text
    # task b has no LoRA score, so neither has the mean
    assert text.count(" - ") == 2


def test_text_of_others_is_no_markup():
    score = Score(accuracy=0.5, stderr=0.1, count=4)
    results = Results(
        name="[/name]",
        ours={"[/task]": score},
        constants={"[/task]": ("[/inst]", score)},
        lora={"[/task]": score},
        lora_note="[/note]",
    )
    text = render(results)
    for word in ("[/name]", "[/task]", "'[/inst]' ([/task])", "LoRA: [/note]"):
        assert word in text


def test_file_round_trip(tmp_path):
    write_results(RESULTS, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == RESULTS
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a results file"):
        read_results(tmp_path / "results.json")


def test_a_failed_write_keeps_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    from pathlib import Path

    def full(self, text, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_stored_row():
    scores, note = stored_scores({"a": [50.0, 2.5], "note": "elsewhere"})
    assert scores == {"a": Score(accuracy=0.5, stderr=0.025, count=0)}
    assert note == "elsewhere"
    with pytest.raises(ConfigError, match=r"eval.compare_row.a: got 50"):
        stored_scores({"a": 50})


@pytest.mark.parametrize("name", ["quickstart", "quickstart_remix"])
def test_the_quickstarts_show_plain_lora_with_its_origin(name):
    """Each task has a stored score, it is the measured one of docs/measurements.md, and the table says where it is from."""
    recipe = load_recipe(name)
    scores, note = stored_scores(recipe.eval.compare_row)
    assert list(scores) == [task.name for task in recipe.data.tasks]
    assert "quickstart_lora" in note
    assert f"{load_recipe('quickstart_lora').train.max_steps} steps" in note
    measured = (Path(__file__).parents[2] / "docs" / "measurements.md").read_text()
    found = Score(accuracy=0.9, stderr=0.03, count=100)
    constants = {task: ("1", Score(accuracy=0.05, stderr=0.02, count=100)) for task in scores}
    results = Results(name="ours", ours=dict.fromkeys(scores, found), constants=constants, lora=scores, lora_note=note)
    zero = {task: Score(accuracy=0.111, stderr=0.01, count=100) for task in scores}
    whole = dataclasses.replace(results, zero_shot=zero)
    for width in (60, 72, 80, 100):
        lines = render(whole, width=width)
        # names and numbers may break, and none of their characters is lost
        cells = [
            "".join(column) for column in zip(*(line.split("│")[1:-1] for line in lines.splitlines() if "│" in line))
        ]
        columns = ["".join(column.split()) for column in cells]
        assert "…" not in lines
        assert [column.count("±") for column in columns[1:5]] == [len(scores) + 1] * 4, width
        assert columns[5].count("+85.0") == len(scores) + 1
        assert columns[0] == "".join([*scores, "mean"])
    text = " ".join(render(results, width=80).split())
    for task, score in scores.items():
        assert f"{task} {score}" in " ".join(measured.split())
        assert str(score) in text
    assert str(mean_score(scores)) in text
    assert "quickstart_lora" in text
