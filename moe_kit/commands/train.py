"""`moe-kit train CONFIG [--key value ...] [--resume] [--compare]`, for adapters and for layer routers."""

from __future__ import annotations

import dataclasses

from moe_kit.commands.options import parse_recipe, quiet_libraries
from moe_kit.errors import ConfigError

__all__ = ["main"]

_FLAGS = {
    "resume": "go on from the last whole checkpoint in the output folder",
    "compare": "also train plain PEFT LoRA with the same budget, in place of the stored row",
}


def main(arguments: list[str]) -> None:
    """Train, evaluate and save.

    Args:
        arguments: Words after `moe-kit train`.

    Raises:
        ConfigError: The recipe or an option is wrong.
        CheckpointError: Something cannot be saved.
        TrainingError: The loss is not finite.
    """
    if arguments and not arguments[0].startswith("-") and _is_layers(arguments[0]):
        _train_layers(arguments)
        return
    recipe, flags = parse_recipe(arguments, command="train", flags=_FLAGS)
    if "compare" in flags:
        recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, compare=True))
    quiet_libraries()
    from moe_kit.training.run import run

    run(recipe, resume="resume" in flags)


def _is_layers(source: str) -> bool:
    from moe_kit.training.recipe import find_config, is_layer_recipe, read_yaml

    return is_layer_recipe(read_yaml(find_config(source)))


def _train_layers(arguments: list[str]) -> None:
    """Train a layer router."""
    if "--compare" in arguments:
        raise ConfigError(f"--compare is for adapters; {arguments[0]} is a layer-router recipe")
    quiet_libraries()
    from moe_kit.training.depth_command import train_command

    train_command(arguments)
