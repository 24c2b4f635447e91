"""Dataclasses from the values of a YAML file: checked by key and by type, with messages that name the place."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from moe_kit.errors import ConfigError


def build(kind: type, values: Any, where: str) -> Any:
    """Build a dataclass from a mapping.

    Args:
        kind: The dataclass; its fields may be dataclasses, tuples, mappings and plain values.
        values: Field -> value.
        where: Dotted name for messages; empty at the root.

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: An unknown key (the nearest is named), a missing one, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'recipe'}: got {_shown(values)}, expected a mapping of {kind.__name__} fields")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"unknown key {_dotted(where, key)!r}: {hint}")
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{_dotted(where, name)} is missing")
    return kind(**{key: _convert(hints[key], value, _dotted(where, key)) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against the type `hint`, turning lists into tuples, mappings into dataclasses, ints into floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: got {_shown(value)}, expected a list")
        return tuple(_convert(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: got {_shown(value)}, expected a mapping")
        return dict(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 (no dot) as text
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{where}: got {_shown(value)}, expected a number") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: got {_shown(value)}, expected {hint.__name__}")
    return value


def plain(value: Any) -> Any:
    """Turn tuples into lists, which is all that plain YAML knows.

    Args:
        value: Nested mappings, lists and tuples.

    Returns:
        The same with lists.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _dotted(where: str, key: Any) -> str:
    """Join a dotted name."""
    return f"{where}.{key}" if where else str(key)


def _shown(value: Any) -> str:
    """Show a wrong value with its type."""
    return f"{value!r} ({type(value).__name__})"
