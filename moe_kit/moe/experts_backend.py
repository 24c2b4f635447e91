"""The experts backend `"moe_kit"` of transformers: `from_pretrained(..., experts_implementation="moe_kit")`.

transformers keeps a registry of functions (module, hidden_states, ids, weights) -> hidden_states that replace the forward
of every experts module whose class is marked for it. The one here serves all of them:

* stacks stored `[E, out, in]` or transposed, with or without biases and gate;
* experts whose block is `act(gate) * up` with a known activation run fused, in `experts_mlp`;
* a model's own `_apply_gate` (GPT-OSS: interleaved halves, clamped), an unknown activation or a norm behind each expert run
  between two `grouped_mm` calls, exactly as the model wrote them;
* ids >= num_experts (expert parallelism marks other ranks' experts so) are empty slots: no work, no gradient.

Legend: T tokens, K slots a token, E experts, D width, H expert width, F = 2H when gated, else H.
"""

from typing import Any

import torch
from torch import Tensor, nn

NAME = "moe_kit"
"""Key in transformers' registry."""

# class name of an activation module -> name in moe_kit_kernels; names, so that no module of transformers is imported here
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


def register() -> None:
    """Name the backend in transformers' registry. Cheap and repeatable; the kernels load when a model first runs."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run one experts module.

    Args:
        module: An experts module of transformers: its stacks and the flags `is_transposed`, `has_bias`, `has_gate`,
            `has_post_expert_norm`, its `act_fn` or `_apply_gate`.
        hidden_states: `[T, D]`.
        top_k_index: `[T, K]` ids; ids >= `module.num_experts` are empty slots.
        top_k_weights: `[T, K]` floating.

    Returns:
        `[T, D]` of `hidden_states`' dtype.

    Raises:
        KernelError: Shapes that do not fit the module's stacks.
    """
    from moe_kit_kernels import experts_mlp, route_plan

    has_bias = module.has_bias
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up_EFD, down_EDH = getattr(module, name), module.down_proj
    if module.is_transposed:
        up_EFD, down_EDH = up_EFD.transpose(1, 2), down_EDH.transpose(1, 2)
    up_bias_EF = getattr(module, f"{name}_bias") if has_bias else None
    down_bias_ED = module.down_proj_bias if has_bias else None
    activation = _fused_activation(module)
    if activation is not None:
        y_TD = experts_mlp(
            hidden_states,
            up_EFD,
            down_EDH,
            top_k_index,
            top_k_weights,
            up_bias_EF=up_bias_EF,
            down_bias_ED=down_bias_ED,
            activation=activation,
        )
        return y_TD.to(hidden_states.dtype)
    plan = route_plan(top_k_index, up_EFD.shape[0])
    return _composed(module, hidden_states, top_k_weights, plan, up_EFD, down_EDH, up_bias_EF, down_bias_ED)


def _composed(
    module: Any,
    x_TD: Tensor,
    weights_TK: Tensor,
    plan: Any,
    up_EFD: Tensor,
    down_EDH: Tensor,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
) -> Tensor:
    """Run the model's own code between the two grouped GEMMs."""
    from moe_kit_kernels import grouped_mm

    T, K = weights_TK.shape
    z_PF = grouped_mm(x_TD, up_EFD, plan, gather=True, bias_EO=up_bias_EF)
    h_PH = module._apply_gate(z_PF) if module.has_gate else module.act_fn(z_PF)
    y_PD = grouped_mm(h_PH, down_EDH, plan, scatter=True, bias_EO=down_bias_ED)
    if module.has_post_expert_norm:
        y_PD = module.post_expert_norm(y_PD)
    # an empty slot's row is zero, but a norm with an offset could make something of it
    weights_TK = weights_TK.masked_fill((plan.expert_P == plan.num_experts).view(T, K), 0)
    weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
    y_TKD = y_PD.view(T, K, -1).to(weights_TK.dtype)
    return torch.einsum("tk,tkd->td", weights_TK, y_TKD).to(x_TD.dtype)


def _fused_activation(module: Any) -> str | None:
    """Return the activation's name in `experts_mlp`, or None when the module needs the composed path."""
    from transformers.integrations.moe import _default_apply_gate

    if module.has_post_expert_norm:
        return None
    if module.has_gate and type(module)._apply_gate is not _default_apply_gate:
        return None
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(act).__name__)
