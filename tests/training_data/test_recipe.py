"""Recipes: round trip, unknown keys, wrong values, dotted overrides."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kit.errors import ConfigError
from moe_kit.training.recipe import (
    Recipe,
    load_recipe,
    recipe_from_dict,
    recipe_to_yaml,
    shipped_configs,
)

SOURCE = {"data": {"file": "a.jsonl"}}


def build(**sections):
    return recipe_from_dict({**SOURCE, **sections})


@pytest.mark.parametrize("name", sorted(name for name in shipped_configs() if "/" not in name))
def test_shipped_configs_load_and_survive_a_round_trip(name):
    recipe = load_recipe(name)
    assert recipe_from_dict(yaml.safe_load(recipe_to_yaml(recipe))) == recipe


@settings(max_examples=30, deadline=None)
@given(
    lr=st.floats(1e-9, 1.0),
    steps=st.integers(1, 10**6),
    prompt=st.none() | st.text(max_size=30),
    extra=st.dictionaries(
        st.text("abc", min_size=1), st.integers() | st.booleans() | st.lists(st.text(max_size=5)), max_size=3
    ),
)
def test_round_trip_of_any_recipe(lr, steps, prompt, extra):
    recipe = recipe_from_dict(
        {
            "adapter": {"preset": "remix", "settings": extra, "upper_layers": 3},
            "data": {"tasks": [{"name": "gcd", "settings": extra, "weight": 2}], "system_prompt": prompt},
            "train": {"learning_rate": lr, "max_steps": steps, "report_to": ["tensorboard"]},
        }
    )
    assert recipe_from_dict(yaml.safe_load(recipe_to_yaml(recipe))) == recipe


def test_every_field_of_every_section_has_help():
    # tyro reads the text below a field; a field without one shows no help
    import inspect

    from moe_kit.training import recipe as module

    for kind in (f.default_factory for f in dataclasses.fields(Recipe) if f.default_factory is not dataclasses.MISSING):
        lines = inspect.getsource(kind).splitlines()
        for f in dataclasses.fields(kind):
            at = next(i for i, line in enumerate(lines) if line.startswith(f"    {f.name}:"))
            assert lines[at + 1].strip().startswith('"""'), f"{kind.__name__}.{f.name} in {module.__name__}"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"trian": {}}, ["unknown key 'trian'", "'train'"]),
        ({"train": {"max_step": 3}}, ["unknown key 'train.max_step'", "'max_steps'"]),
        ({"data": {"tasks": [{"nam": "gcd"}]}}, ["data.tasks.0.nam", "'name'"]),
        ({"data": {"tasks": [{"weight": 1}]}}, ["data.tasks.0.name is missing"]),
        ({"train": {"max_steps": "many"}}, ["train.max_steps", "'many' (str)", "expected int"]),
        ({"train": {"max_steps": True}}, ["train.max_steps", "expected int"]),
        ({"train": {"max_steps": 0}}, ["train.max_steps: got 0", "at least 1"]),
        ({"train": {"learning_rate": float("nan")}}, ["train.learning_rate: got nan"]),
        ({"train": {"learning_rate": "fast"}}, ["train.learning_rate", "expected a number"]),
        ({"train": {"warmup_steps": -1}}, ["train.warmup_steps: got -1"]),
        ({"train": 3}, ["train: got 3 (int)", "mapping"]),
        ({"train": {"report_to": "wandb"}}, ["train.report_to", "expected a list"]),
        ({"adapter": {"settings": [1]}}, ["adapter.settings", "expected a mapping"]),
        ({"adapter": {"upper_layers": 0}}, ["adapter.upper_layers: got 0"]),
        ({"data": {}}, ["got no source", "exactly one of tasks, file, dataset"]),
        ({"data": {"file": "a", "dataset": "b"}}, ["got file and dataset"]),
        ({"data": {"dataset": "b", "eval_file": "c"}}, ["data.eval_file is given without data.file"]),
        ({"data": {"file": "a", "too_long": "shorten"}}, ["data.too_long: got 'shorten'"]),
        ({"data": {"tasks": [{"name": "gcd"}, {"name": "gcd"}]}}, ["'gcd' occurs 2 times"]),
        ({"data": {"tasks": [{"name": "gcd", "settings": {"seed": 1}}]}}, ["data.tasks.0.settings", "seed"]),
        ({"data": {"tasks": [{"name": "gcd", "weight": 0}]}}, ["data.tasks.0.weight: got 0"]),
    ],
)
def test_bad_recipes_say_what_got_expected(sections, words):
    with pytest.raises(ConfigError) as error:
        build(**sections)
    for word in words:
        assert word in str(error.value)


def test_yaml_numbers_without_a_dot_are_numbers():
    # YAML 1.1 reads 1e-3 as text
    recipe = recipe_from_dict(yaml.safe_load("data: {file: a}\ntrain: {learning_rate: 1e-3, weight_decay: 0}"))
    assert recipe.train.learning_rate == 1e-3
    assert isinstance(recipe.train.weight_decay, float)


def test_files_that_are_no_recipes(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "key.yaml").write_text("modle: {}")
    with pytest.raises(ConfigError, match=r"list.yaml: got list, expected a mapping"):
        load_recipe(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match=r"broken.yaml is not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(ConfigError, match=r"key.yaml: unknown key 'modle': did you mean 'model'"):
        load_recipe(tmp_path / "key.yaml")
    with pytest.raises(ConfigError, match=r"Did you mean 'tiny'"):
        load_recipe("tinny")


def test_a_run_folder_is_a_config(tmp_path):
    recipe = build(train={"max_steps": 7})
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path) == recipe
