"""A recipe of a layer router: what one YAML file of `configs/depth/` holds; `depth` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_kit.depth import LayerRoutingConfig
from moe_kit.depth.fit import FitConfig
from moe_kit.depth.search import SearchConfig
from moe_kit.errors import ConfigError
from moe_kit.training.fields import build
from moe_kit.training.recipe import DataConfig, ModelConfig
from moe_kit.training.recipe_files import find_config, is_layer_recipe, read_yaml

_KINDS = ("supervised", "end_to_end", "forecasters", "policy", "lora", "importance", "calibrate")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of training."""

    kind: str
    """`supervised`, `end_to_end`, `forecasters`, `policy`, `lora` (routers frozen and hard). Without
    training: `importance` (the least important layers become the static router's) and `calibrate` (the compute knob
    moves to where `target_rate` of the routed work is saved)."""

    batch_size: int = 8
    """Examples in a step."""

    settings: dict = field(default_factory=dict)
    """Fields of `moe_kit.depth.fit.FitConfig`."""


@dataclass(frozen=True, kw_only=True)
class SearchSection:
    """The label search."""

    output: str = "outputs/depth_labels.jsonl"
    """JSONL file of labels; an interrupted search goes on from it."""

    questions: int = 200
    """Training examples that are searched."""

    scorer: str = "likelihood"
    """`likelihood`: exp(-loss per answer token); `exact`: the task's own scorer on a greedy answer."""

    max_new_tokens: int = 16
    """Longest answer under `exact`."""

    settings: dict = field(default_factory=dict)
    """Fields of `moe_kit.depth.search.SearchConfig`. Under `likelihood`, `correct` is the lowest probability a token
    (geometric mean) that counts as right."""


@dataclass(frozen=True, kw_only=True)
class DepthRecipe:
    """Everything about one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The base model."""

    data: DataConfig
    """Where examples come from."""

    preset: str
    """Preset of `LayerRoutingConfig`."""

    settings: dict = field(default_factory=dict)
    """Further fields of `LayerRoutingConfig`."""

    base_adapter: str | None = None
    """Folder of a LoRA adapter to merge into the base model first: the model fine-tuned on the tasks."""

    lora: dict | None = None
    """Fields of PEFT's `LoraConfig` for an adapter beside the router; needed by the `lora` phase."""

    phases: tuple[PhaseConfig, ...] = ()
    """Phases in order; none for `random` and an evenly spaced `static`."""

    search: SearchSection = field(default_factory=SearchSection)
    """The label search that `supervised` reads."""

    eval_batch_size: int = 16
    """Rows of an evaluation batch."""

    save_steps: int = 50
    """Steps between two states that `--resume` can go on from, 1 or more; the end of a phase and Ctrl-C keep one too."""

    seed: int = 0
    """Seed of the router's weights and of the order of examples."""

    output_dir: str = "outputs/depth"
    """Where the adapters and `results.json` go."""

    def validate(self) -> None:
        """Check what the sections' own types do not.

        Raises:
            ConfigError: naming the field.
        """
        LayerRoutingConfig.from_preset(self.preset, **self.settings)
        for index, phase in enumerate(self.phases):
            if phase.kind not in _KINDS:
                raise ConfigError(f"phases.{index}.kind is {phase.kind!r}, expected one of {', '.join(_KINDS)}.")
            if phase.kind == "lora" and self.lora is None:
                raise ConfigError(f"phases.{index} trains LoRA but the recipe has no `lora` section: give its fields.")
            settings_of(FitConfig, phase.settings, f"phases.{index}.settings")
        if self.save_steps < 1:
            raise ConfigError(f"save_steps is {self.save_steps}, expected 1 or more.")
        if self.search.scorer not in ("likelihood", "exact"):
            raise ConfigError(f"search.scorer is {self.search.scorer!r}, expected 'likelihood' or 'exact'.")
        settings_of(SearchConfig, self.search.settings, "search.settings")


def settings_of(kind: type, values: dict, where: str) -> Any:
    """Build the settings of a phase or of the search.

    Args:
        kind: `FitConfig` or `SearchConfig`.
        values: their fields.
        where: dotted name for messages.

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: an unknown or a missing field.
    """
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}; known: {', '.join(kind.__dataclass_fields__)}.") from error


def load_depth_recipe(source: str | Path | dict, overrides: Sequence[str] = ()) -> DepthRecipe:
    """Read a recipe.

    Args:
        source: a YAML file, the name of a shipped one (`depth/first`), or its content as a dict.
        overrides: words such as `--search.questions 20`, values in YAML.

    Returns:
        The checked recipe.

    Raises:
        ConfigError: if it cannot be read, or a key or value is wrong.
    """
    import yaml

    values = deepcopy(source) if isinstance(source, dict) else read_yaml(find_config(source))
    if not isinstance(source, dict) and not is_layer_recipe(values):
        raise ConfigError(
            f"{source} is no recipe for a layer router: it needs a top-level `preset`, as depth/first has."
        )
    words = [part for word in overrides for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ConfigError(f"options are {list(overrides)}, expected pairs such as --search.questions 20.")
    for key, text in zip(words[::2], words[1::2]):
        try:
            _place(values, key, yaml.safe_load(text))
        except yaml.YAMLError:
            raise ConfigError(f"{key}: {text!r} is not a YAML value") from None
    recipe = build(DepthRecipe, values, "")
    recipe.validate()
    return recipe


def _place(values: dict[str, Any], option: str, value: Any) -> None:
    """Set `--a.b.0.c` in nested mappings and lists; mappings that are missing are made."""
    names = option[2:].replace("-", "_").split(".")
    place: Any = values
    for depth, name in enumerate(names, start=1):
        if isinstance(place, list):
            if not name.isdigit() or int(name) >= len(place):
                raise ConfigError(f"{option}: {name!r} is no place in a list of {len(place)}, numbered from 0")
        elif not isinstance(place, dict):
            raise ConfigError(f"{option}: {name!r} lies inside {place!r}, which is a single value")
        key: Any = int(name) if isinstance(place, list) else name
        if depth == len(names):
            place[key] = value
            return
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[key]
