"""Where recipes lie: the YAML file that a name on the command line means, and its content."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from moe_kit.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Args:
        path: An existing file.

    Returns:
        Its content.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or holds something else than a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        got = "an empty file" if values is None else type(values).__name__
        raise ConfigError(f"{path}: got {got}, expected a mapping with keys model, adapter, data, ...")
    return values


def is_layer_recipe(values: Mapping[str, Any]) -> bool:
    """Whether the content of a recipe is about a layer router (`configs/depth/`), not about an adapter.

    Args:
        values: What `read_yaml` gave.
    """
    return "preset" in values and "adapter" not in values


def find_config(source: str | Path) -> Path:
    """Find the YAML file that a name on the command line means.

    Args:
        source: A YAML file, a folder with `recipe.yaml`, or the name of a shipped config without its ending.

    Returns:
        The path of an existing file.

    Raises:
        ConfigError: There is none; the message lists the shipped configs.
    """
    path = Path(source)
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    shipped = shipped_configs()
    if str(source) in shipped:
        return shipped[str(source)]
    near = difflib.get_close_matches(str(source).removesuffix(".yaml"), shipped, n=1)
    near = near or difflib.get_close_matches(Path(source).stem, shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    what = "a folder without recipe.yaml" if path.is_dir() else "no such file, no such shipped config"
    raise ConfigError(
        f"config {str(source)!r}: {what}; expected a YAML file, a folder that `moe-kit train` wrote, or a shipped name.{hint}"
        f" Shipped: {', '.join(shipped) or 'none'}."
    )


def shipped_configs() -> dict[str, Path]:
    """List the recipes that come with the package.

    Returns:
        Name -> path, those for adapters first, those for layer routers as `depth/first`. In a checkout they live in `configs/`
        beside the package.
    """
    package = Path(str(resources.files("moe_kit")))
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    if folder is None:
        return {}
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    # adapters first, in the order of their names
    return dict(sorted(found.items(), key=lambda item: (item[0].count("/"), item[0])))
