"""A cached property that can be compiled.

`functools.cached_property` holds a lock in Python 3.11, which `torch.compile(fullgraph=True)` refuses, and what it keeps
on an object that outlives the graph would have to be rebuilt behind it. In a graph a value is computed anew at each use
and merged with its equals by the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch

T = TypeVar("T")


class cached(Generic[T]):
    """A property that is computed on first use and then kept on the object, frozen dataclasses included.

    Args:
        function: method that computes the value; two threads may both run it.

    Example:
        >>> class Square:
        ...     side = 3
        ...     @cached
        ...     def area(self):
        ...         return self.side**2
        >>> Square().area
        9
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function = function
        self.__doc__ = function.__doc__
        self.name = function.__name__

    @overload
    def __get__(self, instance: None, owner: type) -> cached[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = self.function(instance)
        if not torch.compiler.is_compiling():
            # past a frozen dataclass's own __setattr__
            object.__setattr__(instance, self.name, value)
        return value
