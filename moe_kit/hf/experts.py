r"""The stacked experts of a transformers block: where their weights are, and one pass through them.

    y_t = sum_k w_tk * down_e(act(up_e(x_t))),   e = ids[t, k]

transformers marks such modules by flags (`is_transposed`, `has_gate`, `has_bias`, `has_post_expert_norm`), whatever the
model. The two products are left to the caller, so that an adapter can take part in them.

Shapes: T tokens, K slots a token, P pairs, E experts, D width, O width out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from moe_kit.errors import RoutingError

if TYPE_CHECKING:
    from moe_kit_kernels import RoutePlan

_FLAGS = ("is_transposed", "has_gate", "has_bias", "has_post_expert_norm")


class Product(Protocol):
    """One of the two products of an experts block."""

    def __call__(self, name: str, x: Tensor, plan: RoutePlan, *, gather: bool = False, scatter: bool = False) -> Tensor:
        """Multiply rows by their expert's matrix.

        Args:
            name: name of the stack.
            x: float [T, D] tokens with `gather`, else [P, D] rows sorted by expert.
            plan: the routing.
            gather: x holds tokens.
            scatter: return rows in the given order instead of sorted.

        Returns:
            float [P, O], bias included.
        """


def up_name(module: Any) -> str:
    """Name of the first stack: gate and up in one where the experts have a gate.

    Args:
        module: an experts module of transformers.
    """
    return "gate_up_proj" if module.has_gate else "up_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether a module is an experts module of transformers, whatever its stacks hold.

    Args:
        module: any module.
    """
    return all(hasattr(module, flag) for flag in _FLAGS)


def stacked_weights(module: nn.Module) -> dict[str, Tensor]:
    """The stacked weights of a module that holds a block's experts.

    Args:
        module: any module.

    Returns:
        Name -> weight [E, ., .], first projection first; empty for any other module and for quantised stacks. It need
        be no parameter: what stands in its place during a pass (`torch.func.functional_call`, FSDP, a parametrisation)
        is a plain tensor.
    """
    if not is_experts(module):
        return {}
    found: dict[str, Any] = {name: getattr(module, name, None) for name in (up_name(module), "down_proj")}
    # a quantised stack is a tensor of a class of its own, or holds whole numbers
    return found if all(_is_stack(weight) for weight in found.values()) else {}


def _is_stack(weight: Any) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and weight.dim() == 3 and weight.is_floating_point()


def weight_of(module: Any, name: str) -> Tensor:
    """A stack as [E, O, D], however it is stored.

    Args:
        module: an experts module of transformers.
        name: name of the stack.

    Raises:
        RoutingError: if what stands there is no stack of matrices: quantised, sharded or flattened.
    """
    weight = getattr(module, name)
    if not _is_stack(weight):
        raise RoutingError(
            f"{name} of {type(module).__name__} is a {type(weight).__name__} of shape {list(weight.shape)}, expected a "
            "plain tensor [experts, ., .]: experts whose weights are quantised, split by tensor or expert parallelism, "
            "or flattened cannot be adapted by target_parameters. Leave these weights whole, or adapt linears only."
        )
    return weight.transpose(1, 2) if module.is_transposed else weight


def run_experts(module: Any, hidden_states: Tensor, ids_TK: Tensor, weights_TK: Tensor, product: Product) -> Tensor:
    """One pass through a block's experts, the model's own code between the two products.

    Args:
        module: an experts module of transformers.
        hidden_states: float [T, D].
        ids_TK: int [T, K]; ids of E or more are empty slots.
        weights_TK: float [T, K].
        product: multiplies by a stack.

    Returns:
        float [T, D] of the input's dtype.
    """
    from moe_kit_kernels import route_plan

    plan = route_plan(ids_TK, getattr(module, up_name(module)).shape[0])
    z_PF = product(up_name(module), hidden_states, plan, gather=True)
    h_PH = module._apply_gate(z_PF) if module.has_gate else module.act_fn(z_PF)
    y_PD = product("down_proj", h_PH, plan, scatter=True)
    if module.has_post_expert_norm:
        y_PD = module.post_expert_norm(y_PD)
    # an empty slot's row is zero, but a norm with an offset could make something of it
    weights_TK = weights_TK.masked_fill((plan.expert_P == plan.num_experts).view_as(ids_TK), 0)
    weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
    y_TKD = y_PD.view(*ids_TK.shape, -1).to(weights_TK.dtype)
    return torch.einsum("tk,tkd->td", weights_TK, y_TKD).to(hidden_states.dtype)
