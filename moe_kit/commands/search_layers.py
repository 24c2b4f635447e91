"""`moe-kit search-layers CONFIG [--key value ...]`: search routes through the layers, the labels of `dr_llm`."""

from __future__ import annotations

import json

from moe_kit.commands.options import quiet_libraries
from moe_kit.errors import ConfigError

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Search with a progress bar, and print the statistics of the labels.

    Args:
        arguments: Words after `moe-kit search-layers`: a layer-router recipe (`depth/dr_llm`, or a YAML file), then
            pairs such as `--search.questions 50`. An interrupted search goes on where it stopped.

    Raises:
        ConfigError: Without a recipe, or with a wrong one.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("moe-kit search-layers needs a recipe: moe-kit search-layers depth/dr_llm [--key value ...]")
    quiet_libraries()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from moe_kit.training.depth import load_depth_recipe, search_layers

    recipe = load_depth_recipe(arguments[0], arguments[1:])
    columns = (
        TextColumn("trees"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("search", total=recipe.search.questions, note="")
        layers: list[int] = []

        def step(done: int, total: int, label: dict) -> None:
            if label["kept"]:
                layers.append(label["layers"])
            note = f"mean layers {sum(layers) / len(layers):.2f}" if layers else "no label yet"
            bar.update(task, completed=done, total=total, note=note)

        result = search_layers(recipe, progress=step)
        bar.update(task, completed=result["questions"], total=result["questions"])
    print(json.dumps(result, indent=2))
    print(f"labels: {recipe.search.output}")
