r"""PEFT's optimizers for LoRA on banks of experts.

PEFT finds A and B by the names of plain LoRA. Here each expert of a bank is such a pair:

    LoRA+      B learns `loraplus_lr_ratio` times faster than A
    LoRA-FA    A is frozen, and the gradient of an expert's B is multiplied by (A A^T)^-1 / scale^2 before the step

Sources: LoRA+, arXiv 2402.12354; LoRA-FA, arXiv 2308.03303.

Shapes: E experts, L rank, D width in, O width out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import peft.optimizers
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_kit.adapters.base_experts import ExpertLoRA
from moe_kit.errors import ConfigError
from moe_kit.experts.bank import Bank
from moe_kit.experts.lora import LoRABank
from moe_kit.experts.shared_a import SharedABank

_PAIRED = (LoRABank, SharedABank, ExpertLoRA)
# A A^T of a fresh expert may be singular; PEFT's own value
_DELTA = 1e-8


def banks_of(model: nn.Module) -> list[Any]:
    """Banks of LoRA experts in a model, those on the experts of the base included.

    Args:
        model: any model.
    """
    return [module for module in model.modules() if isinstance(module, (Bank, ExpertLoRA))]


def faster_b(optimizer: Optimizer, model: nn.Module) -> None:
    """Move each bank's B to the group of an optimizer of PEFT's LoRA+ that learns faster.

    Args:
        optimizer: as `peft.optimizers.create_loraplus_optimizer` makes it, before its first step: its groups are A's,
            embeddings', B's and vectors'.
        model: the model.
    """
    ours = {id(bank.B) for bank in banks_of(model)}
    first, fast = optimizer.param_groups[0], optimizer.param_groups[2]
    fast["params"] += [value for value in first["params"] if id(value) in ours]
    first["params"] = [value for value in first["params"] if id(value) not in ours]


def freeze_a(optimizer: Optimizer, model: nn.Module) -> None:
    """Make an optimizer of PEFT's LoRA-FA treat banks of experts as it treats LoRAs.

    Args:
        optimizer: as `peft.optimizers.create_lorafa_optimizer` makes it.
        model: the model; the A of its trained banks are frozen.

    Raises:
        ConfigError: if a bank has no A for each B.
    """
    banks = [bank for bank in banks_of(model) if bank.B.requires_grad]
    for bank in banks:
        if not isinstance(bank, _PAIRED):
            raise ConfigError(
                f"LoRA-FA multiplies the gradient of a B by the inverse of its A A^T, and a {type(bank).__name__} has no A "
                "for each B: use create_loraplus_optimizer, or any optimizer of torch."
            )
    for bank in banks:
        bank.A.requires_grad_(False)
    kept: list[tuple[nn.Parameter, Tensor]] = []

    def project(*_: Any) -> None:
        for bank in banks:
            if bank.B.grad is not None:
                kept.append((bank.B, bank.B.grad))
                bank.B.grad = projected(bank.B.grad, bank.A.detach(), bank.scale)

    def restore(*_: Any) -> None:
        while kept:
            value, gradient = kept.pop()
            value.grad = gradient

    optimizer.register_step_pre_hook(project)
    optimizer.register_step_post_hook(restore)


def projected(gradient_EOL: Tensor, A: Tensor, scale: float) -> Tensor:
    """Gradient of each B that makes the change of B A the nearest to the full gradient's.

    Args:
        gradient_EOL: gradient of B.
        A: [E, L, D], or [L, D] for all experts.
        scale: multiplies B A.

    Returns:
        float [E, O, L]: gradient (A A^T)^-1 / scale^2.
    """
    A = A.float()
    eye = torch.eye(A.shape[-2], device=A.device)
    inverse = torch.linalg.pinv(A @ A.mT + _DELTA * eye)
    return (gradient_EOL.float() @ inverse / scale**2).to(gradient_EOL.dtype)


def install() -> None:
    """Let PEFT's makers of optimizers know banks of experts; doing it twice changes nothing."""
    makers: dict[str, Callable[[Optimizer, nn.Module], None]] = {
        "create_loraplus_optimizer": faster_b,
        "create_lorafa_optimizer": freeze_a,
    }
    for name, complete in makers.items():
        original = getattr(peft.optimizers, name)
        if hasattr(original, "moe_kit_original"):
            continue
        made = _completed(original, complete)
        for module in (peft.optimizers, sys.modules[original.__module__]):
            setattr(module, name, made)


def _completed(original: Callable[..., Optimizer], complete: Callable[[Optimizer, nn.Module], None]) -> Any:
    @functools.wraps(original)
    def make(model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
        optimizer = original(model, *args, **kwargs)
        complete(optimizer, model)
        return optimizer

    make.moe_kit_original = original  # type: ignore[attr-defined]
    return make


install()
