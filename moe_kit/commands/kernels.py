"""`moe-kit kernels check`: compile every GPU kernel ahead of time; `moe-kit kernels native`: the CPU's compiled code."""

from __future__ import annotations

from importlib import import_module

from moe_kit.errors import ConfigError

__all__ = ["main"]

# packages with C++ for the CPU; experts_mlp and lora_grouped run that of grouped_mm
_NATIVE = ("route_plan", "grouped_mm", "lora_experts")

_HELP = """\
usage: moe-kit kernels check [options]    compile every GPU kernel ahead of time (check --help explains the options)
       moe-kit kernels native             compile the CPU's C++ if that was not done yet; says why where it cannot be
"""


def main(arguments: list[str]) -> int:
    """Run one of the two commands of the kernel package.

    Args:
        arguments: Words after `moe-kit kernels`; the first is `check` or `native`.

    Returns:
        Exit status: 0 when every kernel compiled and passed, or native code runs here; 1 otherwise.

    Raises:
        ConfigError: The first word is neither, or `native` is followed by more.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if arguments[0] == "check":
        from moe_kit_kernels.aot import main as check

        return check(arguments[1:])
    if arguments[0] != "native":
        raise ConfigError(f"got {arguments[0]!r}, expected 'check' or 'native'")
    if arguments[1:] in (["-h"], ["--help"]):
        print(_HELP, end="")
        return 0
    if arguments[1:]:
        raise ConfigError(f"got {' '.join(arguments[1:])!r} after 'native', expected nothing")
    return _native()


def _native() -> int:
    """Load the native code, compiling it where that was not done yet, and print how it stands."""
    from moe_kit_kernels.common.cache import cache_dir

    failed = 0
    for name in _NATIVE:
        library = import_module(f"moe_kit_kernels.{name}.native").NATIVE
        if library.available:
            print(f"{name} runs compiled code on this CPU, kept in {cache_dir() / 'native'}")
        else:
            print(f"{name} runs plain PyTorch on this CPU: {library.why_not}")
            failed = 1
    return failed
