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

from functools import partial
from typing import Any

from torch import Tensor, nn

from moe_kit.hf.experts import run_experts, up_name, weight_of

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
    from moe_kit_kernels import experts_mlp

    activation = _fused_activation(module)
    if activation is not None:
        name = up_name(module)
        y_TD = experts_mlp(
            hidden_states,
            weight_of(module, name),
            weight_of(module, "down_proj"),
            top_k_index,
            top_k_weights,
            up_bias_EF=getattr(module, f"{name}_bias") if module.has_bias else None,
            down_bias_ED=module.down_proj_bias if module.has_bias else None,
            activation=activation,
        )
        return y_TD.to(hidden_states.dtype)
    # the model's own code between two grouped GEMMs
    return run_experts(module, hidden_states, top_k_index, top_k_weights, partial(_product, module))


def _product(module: Any, name: str, x: Tensor, plan: Any, *, gather: bool = False, scatter: bool = False) -> Tensor:
    """Rows times their expert's matrix; see `moe_kit.hf.experts.Product`."""
    from moe_kit_kernels import grouped_mm

    bias_EO = getattr(module, f"{name}_bias") if module.has_bias else None
    return grouped_mm(x, weight_of(module, name), plan, bias_EO=bias_EO, gather=gather, scatter=scatter)


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
