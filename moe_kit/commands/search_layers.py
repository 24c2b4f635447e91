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
    if {"-h", "--help"} & set(arguments):
        print(_help(arguments[0] if not arguments[0].startswith("-") else "depth/dr_llm"))
        return
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


def _help(source: str) -> str:
    """Explain the command and show the search section of a recipe."""
    import dataclasses

    from moe_kit.depth.search import SearchConfig
    from moe_kit.training.depth import load_depth_recipe

    search = load_depth_recipe(source).search
    settings = dataclasses.asdict(SearchConfig(**search.settings))
    return "\n".join(
        [
            f"moe-kit search-layers {source} [--key value ...]: for each training question of a layer-router recipe, a tree",
            "search over routes (skip one or two layers, repeat one) for a shorter one that still answers right. The labels",
            "go to a JSONL file that `moe-kit train depth/dr_llm` learns from; an interrupted search goes on where it stopped.",
            "",
            *(
                f"--search.{f.name} {getattr(search, f.name)}"
                for f in dataclasses.fields(search)
                if f.name != "settings"
            ),
            *(f"--search.settings.{name} {value}" for name, value in settings.items()),
            "",
            "scorer is `exact` (greedy answers, scored by the task) or `likelihood` (probability a token of the right answer;",
            "`correct` is what counts as right, `tolerance` how far a label may fall below the full model). All other fields",
            "of the recipe are options too, as in `moe-kit train`.",
        ]
    )
