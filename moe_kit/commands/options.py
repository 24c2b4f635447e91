"""Options of recipe commands: `CONFIG` first, then any field of the recipe as `--dotted.name value`.

tyro makes the options and their help from the dataclasses. It knows only the keys a free-form mapping already has, so
new keys of `adapter.settings`, `data.tasks.N.settings`, `train.trainer` and `eval.compare_row` are put in before.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from moe_kit.errors import ConfigError
from moe_kit.training.recipe import Recipe, load_recipe, recipe_from_dict, shipped_configs

__all__ = ["parse_recipe", "quiet_libraries"]


def parse_recipe(arguments: list[str], *, command: str, flags: dict[str, str]) -> tuple[Recipe, set[str]]:
    """Read `CONFIG [--key value ...] [flags]`.

    Args:
        arguments: Words after the command.
        command: Its name, for help and messages.
        flags: Flags without a value that the command has beside the recipe's fields, with their help.

    Returns:
        The validated recipe with overrides applied, and the flags that were given, without dashes.

    Raises:
        ConfigError: No config is named, or a value is refused.
        SystemExit: tyro prints help (status 0) or a misspelt option with the nearest ones (status 2).
    """
    given = {
        word.removeprefix("--") for word in arguments if word.removeprefix("--") in flags and word.startswith("--")
    }
    words = [word for word in arguments if word.removeprefix("--") not in given or not word.startswith("--")]
    wants_help = bool({"-h", "--help"} & set(words))
    if not words or words[0].startswith("-"):
        if wants_help:
            print(_help(command, flags))
            sys.exit(0)
        raise ConfigError(f"give a config: `moe-kit {command} CONFIG`, quickstart say, or a YAML file")
    recipe = load_recipe(words[0])
    recipe, words = _new_keys(recipe, words[1:])

    import tyro

    chosen = tyro.cli(
        Recipe,
        default=recipe,
        args=words,
        prog=f"moe-kit {command} {arguments[0]}",
        description=_help(command, flags),
        # every option takes a value, yes-or-no ones too: --eval.zero_shot False
        config=(tyro.conf.FlagConversionOff,),
    )
    # through plain values once more: types and ranges are checked in one place
    return recipe_from_dict(dataclasses.asdict(chosen)), given


def quiet_libraries() -> None:
    """Keep warnings that a user cannot act on out of the terminal."""
    import logging
    import warnings

    from transformers.utils import logging as hf_logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    hf_logging.set_verbosity_error()
    # peft 0.21 still asks transformers under the older name
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _new_keys(recipe: Recipe, words: list[str]) -> tuple[Recipe, list[str]]:
    """Apply `--<mapping>.<new key> value` pairs, where tyro has no option yet; return the other words."""
    import yaml

    values = dataclasses.asdict(recipe)
    rest: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        name, equals, inline = word.partition("=")
        target = _free_mapping(values, name) if word.startswith("--") else None
        if target is None:
            rest.append(word)
            position += 1
            continue
        mapping, key = target
        if not equals and position + 1 >= len(words):
            raise ConfigError(f"{name} needs a value")
        text = inline if equals else words[position + 1]
        try:
            mapping[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{name}: {text!r} is not a YAML value") from None
        position += 1 if equals else 2
    return recipe_from_dict(values), rest


def _free_mapping(values: dict[str, Any], option: str) -> tuple[dict[str, Any], str] | None:
    """Find the free-form mapping that an option adds a key to, else None (tyro's business)."""
    parts = option.removeprefix("--").split(".")
    free = {("adapter", "settings"), ("train", "trainer"), ("train", "policy"), ("eval", "compare_row")}
    if tuple(parts[:-1]) in free:
        mapping = values[parts[0]][parts[1]]
    elif len(parts) == 5 and parts[:2] == ["data", "tasks"] and parts[3] == "settings" and parts[2].isdigit():
        tasks = values["data"]["tasks"]
        if int(parts[2]) >= len(tasks):
            raise ConfigError(f"{option}: the recipe has {len(tasks)} tasks, numbered from 0")
        mapping = tasks[int(parts[2])]["settings"]
    else:
        return None
    return mapping, parts[-1]


def _help(command: str, flags: dict[str, str]) -> str:
    """Explain a recipe command."""
    shipped = [name for name in shipped_configs() if command == "train" or "/" not in name]
    lines = [
        f"moe-kit {command} CONFIG [--key value ...]: CONFIG is a YAML recipe, the name of a shipped one, or a folder that"
        " `moe-kit train` wrote.",
        f"shipped: {', '.join(shipped)}" + (" (depth/... train layer routers)" if command == "train" else ""),
        "",
        *(f"--{name}: {text}" for name, text in flags.items()),
        *([""] if flags else []),
        "Every field of the recipe is an option; values shown are those of CONFIG. Settings of a preset or task that"
        " CONFIG does not mention can be given too: --adapter.settings.lora_alpha 32.",
    ]
    return "\n".join(lines)
