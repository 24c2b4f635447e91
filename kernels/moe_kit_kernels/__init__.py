"""Operators for routed experts: plain references, tuned CPU paths and Triton kernels.

Importing this package is cheap: an operator is loaded when its name is first used.
An operator's folder bears the operator's name; `moe_kit_kernels.<op>` is always the function, the folder's
modules are reached with `from moe_kit_kernels.<op> import reference`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "KernelError": "moe_kit_kernels.errors",
    "MoeKitError": "moe_kit_kernels.errors",
    "RoutePlan": "moe_kit_kernels.route_plan",
    "route_plan": "moe_kit_kernels.route_plan",
    "route_plan_pairs": "moe_kit_kernels.route_plan",
    "lora_experts": "moe_kit_kernels.lora_experts",
    "lora_down": "moe_kit_kernels.lora_experts",
    "lora_up": "moe_kit_kernels.lora_experts",
    "lora_linear": "moe_kit_kernels.lora_linear",
    "lora_linear_group": "moe_kit_kernels.lora_linear",
    "lora_grouped": "moe_kit_kernels.lora_grouped",
    "topk_gate": "moe_kit_kernels.topk_gate",
    "grouped_mm": "moe_kit_kernels.grouped_mm",
    "experts_mlp": "moe_kit_kernels.experts_mlp",
    "token_gather": "moe_kit_kernels.token_gather",
    "token_scatter": "moe_kit_kernels.token_gather",
    "warm_up": "moe_kit_kernels.tuning",
}

__all__ = list(_EXPORTS)


class _Package(ModuleType):
    """Keeps an operator's folder from hiding the operator of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system binds a loaded sub-package on its parent; the function wins over its folder
        if name in _EXPORTS and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _EXPORTS:
            raise AttributeError(f"module 'moe_kit_kernels' has no attribute {name!r}")
        value = getattr(import_module(_EXPORTS[name]), name)
        setattr(self, name, value)
        return value


sys.modules[__name__].__class__ = _Package
