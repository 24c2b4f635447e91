"""Unknown fields of a PEFT configuration: named with the nearest known one, and still passed over by PEFT when it loads.

PEFT reads configurations of later versions by dropping the fields that this one lacks, with a warning. It knows them by
the `TypeError` and the words that Python has for an argument that does not exist; the error here is one, and a
`ConfigError` as well.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from moe_kit.errors import ConfigError

T = TypeVar("T")


class UnknownFieldError(ConfigError, TypeError):
    """A configuration was given a field that it does not have."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or all of them.

    Args:
        name: what was given.
        known: what exists.
    """
    close = get_close_matches(name, known := sorted(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


def reason(kind: type, name: str, known: Iterable[str]) -> str:
    """The rest of a sentence about a field that does not exist: why, or which one is near.

    Args:
        kind: the class; its `refused_fields`, if it has any, say why it lacks some that other methods have.
        name: what was given.
        known: what exists.
    """
    refused = getattr(kind, "refused_fields", {})
    return f": {refused[name]}." if name in refused else f".{suggestion(name, known)}"


def names_unknown_fields(kind: type[T]) -> type[T]:
    """Class decorator: fields that do not exist raise `UnknownFieldError`, which names the nearest one.

    Args:
        kind: a dataclass; put this above `@dataclass`.

    Returns:
        The same class.

    Example:
        >>> from moe_kit.adapters import RoutedAdapterConfig
        >>> RoutedAdapterConfig(num_expert=3)
        Traceback (most recent call last):
        ...
        moe_kit.hf.fields.UnknownFieldError: RoutedAdapterConfig got an unexpected keyword argument 'num_expert'. Did you mean 'num_experts'?
    """
    original = kind.__init__
    known = [field.name for field in fields(kind) if field.init]  # type: ignore[arg-type]

    @functools.wraps(original)
    def checked(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                raise UnknownFieldError(
                    f"{kind.__name__} got an unexpected keyword argument {name!r}{reason(kind, name, known)}"
                )
        original(self, *args, **kwargs)

    kind.__init__ = checked  # type: ignore[assignment]
    return kind
