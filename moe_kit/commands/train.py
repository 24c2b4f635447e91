"""`moe-kit train CONFIG [--key value ...] [--resume] [--compare]`, for adapters and for layer routers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from moe_kit.commands.options import parse_recipe, quiet_libraries
from moe_kit.errors import ConfigError

__all__ = ["main"]

_FLAGS = {
    "resume": "go on from the last whole checkpoint in the output folder",
    "compare": "also train plain PEFT LoRA with the same budget, in place of the stored row",
}
_EVERY = 10


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
    """Train a layer router: every tenth step, then the held-out figures as JSON."""
    source, words = arguments[0], arguments[1:]
    if {"-h", "--help"} & set(words):
        from moe_kit.training.recipe import find_config

        path = find_config(source)
        print(
            f"moe-kit train {source} [--key value ...]: trains a layer router and saves it with its evaluation.\n\n"
            "Every field is an option with a dotted name, values in YAML: --phases.0.settings.steps 100. The recipe:\n\n"
            f"{path.read_text(encoding='utf-8')}"
        )
        return
    for flag in _FLAGS:
        if f"--{flag}" in words:
            raise ConfigError(f"--{flag} is for adapters; a layer-router recipe such as {source} runs from its start")
    quiet_libraries()
    from moe_kit.training.depth import load_depth_recipe, train_layers

    recipe = load_depth_recipe(source, words)

    def step(kind: str, index: int, loss: float) -> None:
        if index % _EVERY == 0:
            print(f"{kind} {index}: {loss:.4f}", flush=True)

    results = train_layers(recipe, on_step=step)
    print(json.dumps(results["held_out"], indent=2))
    print(f"saved to {Path(recipe.output_dir)}")
