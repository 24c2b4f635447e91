"""Class swap: a routed module keeps its children, names and isinstance checks, and gets another forward.

The generated class is a subclass of the module's own, with the same name, so capture hooks, gradient checkpointing
(transformers wraps the forward of every subclass and checkpoints in the outermost one), `_no_split_modules` and other
PEFT methods see what they saw before. A wrapper around a decoder layer would hide everything below it from PEFT.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from moe_kit.hf.layers import UNIT

_CLASSES: dict[type, type] = {}
_BASE = "_moe_depth_base"


def routed_class(base: type) -> type:
    """The routed subclass of a module class, made once.

    Args:
        base: class of a decoder layer, attention or MLP.

    Returns:
        A subclass with the same name, whose forward asks the module's unit.
    """
    if base in _CLASSES:
        return _CLASSES[base]
    inner = base.forward
    names = tuple(inspect.signature(inner).parameters)[1:]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        unit = self._modules[UNIT]
        present = unit.state.present
        if unit in present.executing:
            return inner(self, *args, **kwargs)
        if unit in present.skipping:
            return args[0] if args else kwargs[names[0]]
        if unit.active_name() is None:
            return inner(self, *args, **kwargs)
        if len(args) > 1:
            kwargs = {**dict(zip(names[1:], args[1:])), **kwargs}
        x = args[0] if args else kwargs.pop(names[0])
        return unit.run(self, inner, x, kwargs)

    def reduce(self: nn.Module) -> tuple:
        return (_rebuild, (base,), self.__dict__)

    forward.__doc__ = f"Forward of {base.__name__} under a layer router."
    namespace = {
        "forward": forward,
        "__reduce__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        _BASE: base,
    }
    _CLASSES[base] = type(base)(base.__name__, (base,), namespace)
    return _CLASSES[base]


def _rebuild(base: type) -> nn.Module:
    """Empty routed module of a class; unpickling fills it."""
    cls = routed_class(base)
    return cls.__new__(cls)


def swap_in(module: nn.Module, unit: Any) -> None:
    """Put a unit into a module and its forward under the unit's control."""
    module.add_module(UNIT, unit)
    unit.host = [module]
    module.__class__ = routed_class(type(module))


def swap_out(module: nn.Module) -> None:
    """Undo `swap_in`."""
    if UNIT in module._modules:
        del module._modules[UNIT]
        module.__class__ = getattr(type(module), _BASE)
