"""Public functions of routed LoRA experts with the base product inside.

    y_i = x W_i^T + bias_i + scale * sum_k w_k B_i,e A_i,e x        for projections i that share x and the routing

The forward writes each y once, the backward accumulates dx = sum_i dy_i W_i + dH A in place: one addition of [T, D]
through autograd less for every projection and every adapter.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

from collections.abc import Sequence

from torch import Tensor

from moe_kit_kernels.common.checks import check_device, check_float, check_shape, fail
from moe_kit_kernels.lora_experts.dispatch import Decision, run_linears
from moe_kit_kernels.lora_experts.interface import BACKENDS, check_backend, check_experts
from moe_kit_kernels.route_plan import RoutePlan


def lora_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    A_ELD: Tensor,
    B_EOL: Tensor,
    expert_ids_TK: Tensor | None,
    weights_TK: Tensor,
    *,
    plan: RoutePlan | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Apply a linear layer and its routed LoRA experts.

    Args:
        x_TD: [T, D] inputs.
        weight_OD: [O, D] base weight, usually frozen; it gets a gradient only when it requires one.
        bias_O: [O] base bias or None.
        A_ELD: [E, L, D] down projections; may be wider than x.
        B_EOL: [E, O, L] up projections.
        expert_ids_TK: [T, K] ids, or None as in `lora_experts`.
        weights_TK: [T, K] float32 weights, [P] with a plan of pairs, [T, E] with neither ids nor plan.
        plan: the routing's plan, shared among layers. Built here when None.
        scale: factor on the adapters' sum.
        backend: as in `lora_experts`.

    Returns:
        [T, O] in the dtype that the linear layer has.

    Raises:
        KernelError: shapes, dtypes, devices or ids that do not fit, an unknown backend, or (in the backward) a frozen
            weight that was changed in place after the forward.
    """
    group = lora_linear_group(
        x_TD,
        (weight_OD,),
        (bias_O,),
        (A_ELD,),
        (B_EOL,),
        expert_ids_TK,
        weights_TK,
        plan=plan,
        scale=scale,
        backend=backend,
    )
    return group[0]


def lora_linear_group(
    x_TD: Tensor,
    weights_OD: Sequence[Tensor],
    biases_O: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    expert_ids_TK: Tensor | None,
    weights_TK: Tensor,
    *,
    plan: RoutePlan | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Apply several linear layers with routed LoRA experts to one input under one routing (q, k, v; gate, up).

    Args:
        x_TD: [T, D] inputs.
        weights_OD: base weights [O_i, D].
        biases_O: base biases [O_i] or None, one a projection.
        A: down projections [E, L_i, D].
        B: up projections [E, O_i, L_i].
        expert_ids_TK: as in `lora_linear`.
        weights_TK: as in `lora_linear`.
        plan: as in `lora_linear`.
        scale: factor on the adapters' sums, one for all.
        backend: as in `lora_experts`.

    Returns:
        One [T, O_i] a projection.

    Raises:
        KernelError: as in `lora_linear`, or sequences of different lengths.
    """
    name = "lora_linear"
    n = len(weights_OD)
    if not n or any(len(part) != n for part in (biases_O, A, B)):
        got = f"{n}, {len(biases_O)}, {len(A)}, {len(B)} weights, biases, A and B"
        raise fail(name, "the group", got, "as many of each, at least one", "Pass one entry a projection")
    check_backend(name, backend, BACKENDS)
    _T, E = x_TD.shape[0], A[0].shape[0]
    for w, bias, a, b in zip(weights_OD, biases_O, A, B, strict=True):
        check_experts(name, x_TD, a, b)
        check_shape(name, "A_ELD", a, (E, None, None), "the number of experts of the first projection")
        check_float(name, "weight_OD", w, 2)
        check_shape(name, "weight_OD", w, (b.shape[1], x_TD.shape[1]), "[O, D] with O of B and D of x")
        if bias is not None:
            check_float(name, "bias_O", bias, 1)
            check_shape(name, "bias_O", bias, (b.shape[1],), "[O] with O of B")
        check_device(name, x_TD.device, weight_OD=w, bias_O=bias)
    check_device(name, x_TD.device, weights=weights_TK, ids=expert_ids_TK)
    decision = Decision(expert_ids_TK, weights_TK, plan)
    return run_linears(name, backend, decision, float(scale), x_TD, weights_OD, biases_O, A, B)
