"""The folder in which things are kept that can be made again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the user's cache folder; it is not created here.

    Returns:
        `$MOE_KIT_CACHE`, else `$XDG_CACHE_HOME/moe_kit`, else `~/.cache/moe_kit`.
    """
    if chosen := os.environ.get("MOE_KIT_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "moe_kit"
