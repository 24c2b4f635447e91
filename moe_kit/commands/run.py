"""`moe-kit run -m MODULE ...`: another tool in a process that knows our PEFT methods.

Neither PEFT nor transformers has an entry point that would load a package for the sake of a method, so a tool that loads
adapter folders by itself meets `KeyError: 'MOE_ADAPTER'` unless somebody imports moe_kit first. This command does, and
then runs the module as `python -m MODULE` would.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys

from moe_kit.errors import ConfigError

__all__ = ["main"]

_HELP = """\
usage: moe-kit run -m MODULE [its options]

Runs a module as `python -m MODULE` does, with moe_kit imported first, so that adapters of routed experts and layer
routers load there like any other PEFT adapter. Without it such tools stop with KeyError: 'MOE_ADAPTER' (or 'MOE_DEPTH').

examples
  moe-kit run -m lm_eval --model hf --model_args pretrained=BASE,peft=DIR --tasks arc_easy
  moe-kit run -m transformers.cli.transformers serve DIR    (DIR: the base's files with the adapter's beside them)
  accelerate launch -m moe_kit run -m lm_eval ...     several processes: each runs `python -m moe_kit run ...`

In a script of your own one line does the same, above the first adapter that is loaded: import moe_kit
"""


def main(arguments: list[str]) -> None:
    """Run a module with moe_kit imported.

    Args:
        arguments: Words after `moe-kit run`: `-m`, the module, and everything that is the module's own.

    Raises:
        ConfigError: No module is named, or it does not exist.
        SystemExit: As the module leaves.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        print(_HELP, end="")
        return
    if len(arguments) < 2 or arguments[0] != "-m":
        given = " ".join(arguments) or "nothing"
        raise ConfigError(f"got {given!r}, expected `-m MODULE` first: `moe-kit run -m lm_eval --help` for instance")
    module = arguments[1]
    # as `python -m` does it: what lies in the working folder is found, and nothing beside the `moe-kit` script is
    sys.path[0] = os.getcwd()
    import moe_kit  # noqa: F401  registers the PEFT methods

    _check_exists(module)
    sys.argv = arguments[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _check_exists(module: str) -> None:
    """Refuse what cannot be run as a module; errors while it runs are its own."""
    try:
        spec = importlib.util.find_spec(module)
        found = spec is not None
        if found and spec.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{module}.__main__") is not None
    except ModuleNotFoundError as error:
        # a package on the way is missing; anything else that a package imports is told as it is
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        found = False
    if not found:
        raise ConfigError(
            f"there is no module {module!r} to run in this environment ({sys.executable}), nor a package of that name with "
            "a __main__: install what it belongs to, or mend the name (a module's, such as lm_eval, not a file's)"
        )
