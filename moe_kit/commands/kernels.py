"""`moe-kit kernels check --arch sm_80 sm_90 sm_100 --json FILE --keep DIR`: compile every kernel ahead of time."""

from __future__ import annotations

from moe_kit.errors import ConfigError

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Hand the words on to the check of the kernel package.

    Args:
        arguments: Words after `moe-kit kernels`; the first is `check`.

    Returns:
        Exit status: 0 when every kernel compiled and passed, 1 otherwise.

    Raises:
        ConfigError: The first word is not `check`.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: moe-kit kernels check [options] (moe-kit kernels check --help explains them)")
        return 0
    if arguments[0] != "check":
        raise ConfigError(f"got {arguments[0]!r}, expected 'check'")
    from moe_kit_kernels.aot import main as check

    return check(arguments[1:])
