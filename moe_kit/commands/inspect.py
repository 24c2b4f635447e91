"""`moe-kit inspect CONFIG_OR_DIR [--key value ...]`: what would be, or was, adapted."""

from __future__ import annotations

from pathlib import Path

from moe_kit.commands.options import parse_recipe, quiet_libraries

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Print modules, parameters, FLOPs and routers.

    Args:
        arguments: Words after `moe-kit inspect`. A folder of a finished run shows the saved adapter; a config shows the
            adapter that training would start from.
    """
    recipe, _ = parse_recipe(arguments, command="inspect", flags={})
    quiet_libraries()
    from rich.console import Console
    from rich.markup import escape

    from moe_kit.training.inspection import inspect_model, print_inspection
    from moe_kit.training.models import load_model_and_tokenizer
    from moe_kit.training.run import load_run
    from moe_kit.training.wrapping import wrap_model

    if (Path(arguments[0]) / "adapter_config.json").is_file():
        model, _, recipe = load_run(arguments[0])
        # a loaded adapter is frozen; show what was trained
        model.set_adapter("default")
    else:
        base, _ = load_model_and_tokenizer(recipe.model.name, dtype=recipe.model.dtype)
        model = wrap_model(base, recipe.adapter, seed=recipe.train.seed)
    console = Console(highlight=False, emoji=False)
    console.print(f"base model: {escape(recipe.model.name)}")
    print_inspection(inspect_model(model), console)
