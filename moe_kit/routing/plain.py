"""`is_untouched`: the one question that whoever reads a module's tensors past its call asks first.

A fused operator multiplies by `module.weight` itself. That equals calling the module only while nobody stands in between: hooks,
a replaced `forward`, weights that accelerate keeps elsewhere until the call (meta tensors until then), sharded or quantised weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_untouched(module: nn.Module) -> bool:
    """Return True if calling a module is its class's `forward` on its own tensors in memory, and nothing else.

    Its children are not asked.

    Args:
        module: any module.

    Returns:
        False with hooks on it, a `forward` of its own, offloaded tensors, or tensors of a subclass (sharded, quantised), and while
        something else stands for its parameters (`torch.func.functional_call`, parametrizations).
    """
    own = module.__dict__
    # spelled out: it is asked for every linear at every decoded token
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    if "forward" in own or "_hf_hook" in own:
        return False
    for value in own["_parameters"].values():
        if value is not None and (type(value) is not nn.Parameter or value.is_meta):
            return False
    for value in own["_buffers"].values():
        if value is not None and (type(value) is not Tensor or value.is_meta):
            return False
    # a parametrized module keeps its tensors in a child
    return "parametrizations" not in own["_modules"] and not _has_any_global_hook()


def call_with(module: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """Call a module with another forward, so that its hooks fire and accelerate brings its weights for as long as it runs.

    Args:
        module: any module.
        forward: what runs in place of its own; reads the module's tensors.
        *args: arguments.

    Returns:
        What the call returns.
    """
    # accelerate's own forward lies in front and calls the one that it found
    own, name = module.__dict__, "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    before = own.get(name)
    own[name] = forward
    try:
        return module(*args)
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before
