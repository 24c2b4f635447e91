"""Typed errors of moe_kit. A message says what failed, what was got, what was expected, and how to fix it."""

from moe_kit_kernels.errors import KernelError, MoeKitError

__all__ = ["CheckpointError", "ConfigError", "KernelError", "MoeKitError", "RoutingError", "TrainingError"]


class ConfigError(MoeKitError, ValueError):
    """A configuration, recipe or command line cannot be used as written."""


class RoutingError(MoeKitError, ValueError):
    """A routing decision cannot be made or applied: ids out of range, missing task ids, wrong shapes."""


class CheckpointError(MoeKitError, RuntimeError):
    """A saved adapter or training state is missing, truncated, foreign or does not fit the model."""


class TrainingError(MoeKitError, RuntimeError):
    """Training cannot go on: its loss is no longer a finite number."""
