"""Every shipped layer-router recipe loads, and runs end to end on the tiny model."""

import dataclasses
import json

import pytest
import yaml

from moe_kit import CheckpointError, ConfigError, load_adapters
from moe_kit.training.depth import load_depth_recipe, run_depth, search_layers, train_layers
from moe_kit.training.models import load_model_and_tokenizer
from moe_kit.training.recipe import shipped_configs

FOLDER = next(iter(shipped_configs().values())).parent / "depth"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TASK = dict(name="chain_sum", settings=dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1))


def shrunk(name, tmp_path):
    """A shipped recipe on the tiny random model, one small task, two steps a phase."""
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    values["model"]["name"] = "tiny"
    values["data"].update(tasks=[TASK], eval_examples=6, max_length=128)
    values["base_adapter"] = None
    values["output_dir"] = str(tmp_path / "out")
    values["eval_batch_size"] = 3
    values.setdefault("search", {}).update(
        output=str(tmp_path / "labels.jsonl"),
        questions=6,
        scorer="likelihood",
        settings=dict(simulations=3, correct=1e-6, batch_size=3),
    )
    for phase in values.get("phases", []):
        phase["batch_size"] = 2
        phase["settings"] = {**phase.get("settings", {}), "steps": 2, "warmup_steps": 0}
    return load_depth_recipe(values)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_run_on_the_tiny_model(name, tmp_path):
    load_depth_recipe(f"depth/{name}")
    recipe = shrunk(name, tmp_path)
    if any(phase.kind == "supervised" for phase in recipe.phases):
        with pytest.raises(CheckpointError, match="no usable labels"):
            train_layers(recipe)
        stats = search_layers(recipe)
        assert stats["questions"] == 6
        assert stats["kept"] > 0
    results = run_depth(recipe)
    assert results["held_out"]["mean"]["nats_per_token"] > 0
    assert 0 < results["held_out"]["mean"]["layers"] <= 8
    assert 0 <= results["held_out"]["mean"]["exact"] <= 1
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    model, _ = load_model_and_tokenizer("tiny")
    assert "depth" in load_adapters(model, tmp_path / "out")


def test_finished_recipes_take_no_options(tmp_path):
    with pytest.raises(ConfigError, match="with a finished recipe"):
        run_depth(shrunk("random", tmp_path), ["--seed", "1"])


def test_exact_scorer_searches_whole_answers(tmp_path):
    recipe = shrunk("dr_llm", tmp_path)
    object.__setattr__(recipe.search, "scorer", "exact")
    assert search_layers(recipe)["evaluations"] >= 6


def changed(recipe, **sections):
    """A recipe with other fields in some sections."""
    fields = {name: dataclasses.replace(getattr(recipe, name), **values) for name, values in sections.items()}
    return dataclasses.replace(recipe, **fields)


def test_labels_belong_to_their_questions_their_model_and_their_scorer(tmp_path):
    recipe = shrunk("dr_llm", tmp_path)
    stats = search_layers(recipe)
    again = changed(recipe, search=dict(settings=dict(recipe.search.settings, batch_size=2)))
    assert search_layers(again) == stats
    for other in (
        changed(recipe, search=dict(scorer="exact")),
        changed(recipe, model=dict(name="tiny-other")),
        changed(recipe, data=dict(system_prompt="Think.")),
    ):
        with pytest.raises((CheckpointError, ConfigError)) as refused:
            search_layers(other)
        if other.model == recipe.model:
            assert "was searched" in str(refused.value)
    with pytest.raises(CheckpointError, match="labels other questions"):
        train_layers(changed(recipe, data=dict(system_prompt="Think.")))
    # labels without a digest were not made for anything in particular
    path = tmp_path / "labels.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "digest"}) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match="labels other questions"):
        train_layers(recipe)


def test_search_command_shows_progress_and_statistics(tmp_path, capsys):
    from moe_kit.commands.search_layers import main
    from moe_kit.training.recipe import recipe_to_yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(shrunk("dr_llm", tmp_path)))
    main([str(path), "--search.questions", "4"])
    out = capsys.readouterr().out
    bar, printed = out[: out.index("{")], out[out.index("{") : out.rindex("}") + 1]
    assert "4/4" in bar
    assert "mean layers" in bar
    stats = json.loads(printed)
    assert stats["questions"] == stats["kept"] == 4
    assert sum(stats["class_counts"]) == 4 * stats["num_layers"]
    assert stats == json.loads((tmp_path / "labels.jsonl.stats.json").read_text())
    assert f"labels: {tmp_path / 'labels.jsonl'}" in out
    with pytest.raises(ConfigError, match="needs a recipe"):
        main(["--search.questions", "4"])


def test_wrong_recipes_are_refused(tmp_path):
    values = yaml.safe_load((FOLDER / "first.yaml").read_text())
    for change, message in (
        ({"presets": 1}, "unknown key"),
        ({"phases": [{"kind": "lora_phase"}]}, "expected one of"),
        ({"phases": [{"kind": "policy", "settings": {"step": 3}}]}, "known: steps"),
        ({"lora": None}, "no `lora` section"),
        ({"preset": "fist"}, "Did you mean 'first'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_depth_recipe({**values, **change})
    with pytest.raises(ConfigError, match="no such shipped config"):
        load_depth_recipe("depth/none")
    with pytest.raises(ConfigError, match="whole layers per sequence"):
        search_layers(load_depth_recipe("depth/informed"))
    assert load_depth_recipe("depth/first", ["--seed", "3"]).seed == 3
