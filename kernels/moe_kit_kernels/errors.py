"""Typed errors. A message says what failed, what was got, what was expected, and how to fix it.

They live in the lowest layer of the house so that every layer above can raise them; `moe_kit.errors` names them all.
"""


class MoeKitError(Exception):
    """Base of every error that moe_kit raises on purpose."""


class KernelError(MoeKitError, ValueError):
    """An operator was called with shapes, ids, devices or a backend it cannot serve."""
