"""The command line of layer-router recipes: what `moe-kit train depth/...` and `train/depth_train.py` do."""

from __future__ import annotations

import json
from collections.abc import Sequence

from moe_kit.training.depth import run_depth
from moe_kit.training.depth_recipe import load_depth_recipe
from moe_kit.training.recipe_files import find_config

_EVERY = 10


def train_command(arguments: Sequence[str]) -> None:
    """Train a layer router: every tenth step, then the held-out figures as JSON.

    Args:
        arguments: a recipe (`depth/first`, a YAML file, or the folder of an earlier run), then pairs such as
            `--phases.0.settings.steps 100`, and `--resume` to go on where an interrupted run stopped.

    Raises:
        ConfigError: if the recipe or an option is wrong.
        CheckpointError: if searched labels are missing, or the kept state cannot be read.
        KeyboardInterrupt: interrupted; the message says how to go on.
    """
    source, words = arguments[0], list(arguments[1:])
    if {"-h", "--help"} & set(words):
        print(
            f"moe-kit train {source} [--key value ...] [--resume]: trains a layer router and saves it with its "
            "evaluation.\n\nEvery field is an option with a dotted name, values in YAML: --phases.0.settings.steps 100. "
            "--resume goes on where an\ninterrupted run with the same output_dir stopped. The recipe:\n\n"
            f"{find_config(source).read_text(encoding='utf-8')}"
        )
        return
    resume = "--resume" in words
    recipe = load_depth_recipe(source, [word for word in words if word != "--resume"])

    def step(kind: str, index: int, loss: float) -> None:
        if index % _EVERY == 0:
            print(f"{kind} {index}: {loss:.4f}", flush=True)

    results = run_depth(recipe, resume=resume, on_step=step)
    print(json.dumps(results["held_out"], indent=2))
    print(f"saved to {recipe.output_dir}")
