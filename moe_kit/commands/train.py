"""`moe-kit train CONFIG [--key value ...] [--resume] [--compare]`."""

from __future__ import annotations

import dataclasses

from moe_kit.commands.options import parse_recipe, quiet_libraries

__all__ = ["main"]

_FLAGS = {
    "resume": "go on from the last whole checkpoint in the output folder",
    "compare": "also train plain PEFT LoRA with the same budget, in place of the stored row",
}


def main(arguments: list[str]) -> None:
    """Train, evaluate and save.

    Args:
        arguments: Words after `moe-kit train`.
    """
    recipe, flags = parse_recipe(arguments, command="train", flags=_FLAGS)
    if "compare" in flags:
        recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, compare=True))
    quiet_libraries()
    from moe_kit.training.run import run

    run(recipe, resume="resume" in flags)
