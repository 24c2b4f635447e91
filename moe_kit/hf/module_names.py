"""`modules_to_save` by path, where a name of the user's would also match a part of ours.

PEFT trains and saves every module whose path ends in a given name, and looks for them after the adapters are in place:
a base with a module `scorer` would get the routers' own scores wrapped as well.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from moe_kit.errors import ConfigError

INNER = frozenset(
    {
        *("moe_adapter_bank", "moe_adapter_router", "moe_depth_router", "moe_depth_forecaster", "depth_unit"),
        *("scorer", "select", "stepper", "freeze", "dropout", "down", "up", "last", "predictor"),
    }
)
"""Names of modules inside our tuner layers; adapted stacks of experts are called as the base calls them."""

_OURS = re.compile(r"\.(moe_adapter_bank|moe_adapter_router|depth_unit)(\.|$)")


def name_by_path(model: nn.Module, config: Any) -> None:
    """Replace names in `config.modules_to_save` that match parts of ours by the paths of the base's modules.

    Args:
        model: the inner model, before the adapter is put in.
        config: a PEFT configuration, changed in place.

    Raises:
        ConfigError: if such a name matches no module of the base.
    """
    stacks = {name.rpartition(".")[2] for name in getattr(config, "target_parameters", None) or ()}
    found: list[str] = []
    for name in config.modules_to_save or ():
        if not any(inner.endswith(name) for inner in INNER | stacks):
            found.append(name)
            continue
        paths = [path for path, _ in model.named_modules() if path.endswith(name) and not _is_ours(model, path)]
        if not paths:
            raise ConfigError(
                f"modules_to_save names {name!r}, which is no module of {type(model).__name__}: name modules of the model."
            )
        found += paths
    if config.modules_to_save:
        config.modules_to_save = found


def _is_ours(model: nn.Module, path: str) -> bool:
    """Whether a path leads into a tuner layer's own parts; the base may have modules of these names as well."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(
        isinstance(model.get_submodule(path[: match.start()]), BaseTunerLayer) or match[1] == "depth_unit"
        for match in _OURS.finditer(path)
    )
