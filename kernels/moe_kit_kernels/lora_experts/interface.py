"""Public functions of routed LoRA experts: argument checks, choice of implementation, autocast.

    y_t = base_t + scale * sum_k w_tk B_e(t,k) A_e(t,k) x_t

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kit_kernels.common.autocast import autocast_dtype, cast_all, no_autocast
from moe_kit_kernels.common.checks import check_device, check_float, check_shape, fail
from moe_kit_kernels.lora_experts import halves
from moe_kit_kernels.lora_experts.choice import check_kernels
from moe_kit_kernels.lora_experts.decision import Decision, check_decision
from moe_kit_kernels.lora_experts.dispatch import run_experts
from moe_kit_kernels.lora_experts.reference import lora_down_reference, lora_up_reference
from moe_kit_kernels.route_plan import RoutePlan, check_plan_device

BACKENDS = ("auto", "native", "dense", "sorted", "decode", "triton", "reference")
HALF_BACKENDS = ("auto", "dense", "triton", "reference")


def check_experts(operator: str, x_TD: Tensor, A_ELD: Tensor, B_EOL: Tensor) -> None:
    """Check the shapes, dtypes and devices of x and of one bank.

    Args:
        operator: public name, for messages.
        x_TD: [T, D].
        A_ELD: [E, L, D].
        B_EOL: [E, O, L].

    Raises:
        KernelError: something does not fit.
    """
    x_shape, A_shape, B_shape = x_TD.shape, A_ELD.shape, B_EOL.shape
    if (
        (len(x_shape), len(A_shape), len(B_shape)) == (2, 3, 3)
        and A_shape[2] == x_shape[1]
        and B_shape[0] == A_shape[0]
        and B_shape[2] == A_shape[1]
        and x_TD.device == A_ELD.device == B_EOL.device
        and x_TD.is_floating_point()
        and A_ELD.is_floating_point()
        and B_EOL.is_floating_point()
    ):
        return
    # something does not fit: say what
    check_float(operator, "x_TD", x_TD, 2)
    check_float(operator, "A_ELD", A_ELD, 3)
    check_float(operator, "B_EOL", B_EOL, 3)
    E, L, _ = A_ELD.shape
    check_shape(operator, "A_ELD", A_ELD, (None, None, x_TD.shape[1]), "[E, L, D] with D of x")
    check_shape(operator, "B_EOL", B_EOL, (E, None, L), "[E, O, L] with E and L of A")
    check_device(operator, x_TD.device, A_ELD=A_ELD, B_EOL=B_EOL)


def check_backend(operator: str, backend: str, known: Sequence[str]) -> None:
    """Check the name of a backend.

    Args:
        operator: public name, for messages.
        backend: the name passed by the user.
        known: names this operator has.

    Raises:
        KernelError: an unknown name.
    """
    if backend not in known:
        raise fail(operator, "backend", repr(backend), f"one of {', '.join(known)}", 'Use "auto" to let it choose')


def lora_experts(
    x_TD: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    expert_ids_TK: Tensor | None,
    weights_TK: Tensor,
    *,
    plan: RoutePlan | None = None,
    scale: float = 1.0,
    base_TO: Tensor | None = None,
    overwrite_base: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Add routed LoRA experts to the result of a dense layer.

    Args:
        x_TD: [T, D] inputs of the layer, float.
        A_ELD: [E, L, D] down projections; may be wider than x (float32 adapters on a bfloat16 base).
        B_EOL: [E, O, L] up projections, dtype of A.
        expert_ids_TK: [T, K] integer ids; -1 and ids >= E are empty slots. None with a `plan`; None without a plan
            means that every expert is chosen and the weights are [T, E].
        weights_TK: [T, K] float32 weights ([P] with a plan of pairs). They get a gradient.
        plan: the routing's plan, to share one plan among the layers of a block. Built here when None.
        scale: factor on the sum; alpha / rank in LoRA.
        base_TO: [T, O] result of the frozen layer; None adds nothing.
        overwrite_base: allow writing the result over `base_TO`, which saves a pass over [T, O]. Only for a fresh
            tensor whose value nobody else reads, also not its own backward.
        backend: "dense" computes all experts by two GEMMs and masks; "sorted" computes the chosen ones; "native" does so in
            compiled code (float32 on the CPU); "decode" is for a few tokens without gradients; "triton" insists on the GPU
            kernels; "reference" is the plain definition; "auto" asks the cost model, takes Triton on a GPU and never fails.

    Returns:
        [T, O] in the dtype of the base, else of x.

    Raises:
        KernelError: shapes, dtypes, devices or ids that do not fit, an unknown backend, decode with gradients, or
            Triton or native code where it cannot run.

    Source: the module's equation; the gate's gradient is taken in rank space, so nothing of size P*O is kept.
    """
    name = "lora_experts"
    check_experts(name, x_TD, A_ELD, B_EOL)
    check_backend(name, backend, BACKENDS)
    T, _E, O = x_TD.shape[0], A_ELD.shape[0], B_EOL.shape[1]
    device = x_TD.device
    if (
        weights_TK.device != device
        or (base_TO is not None and base_TO.device != device)
        or (expert_ids_TK is not None and expert_ids_TK.device != device)
    ):
        check_device(name, device, weights=weights_TK, base_TO=base_TO, ids=expert_ids_TK)
    if base_TO is not None and not (base_TO.shape == (T, O) and base_TO.is_floating_point()):
        check_float(name, "base_TO", base_TO, 2)
        check_shape(name, "base_TO", base_TO, (T, O), "[T, O] with T of x and O of B")
    decision = Decision(expert_ids_TK, weights_TK, plan)
    return run_experts(
        name, backend, decision, float(scale), x_TD, base_TO, A_ELD, B_EOL, overwrite_base=overwrite_base
    )


def _check_triton(operator: str, backend: str, plan: RoutePlan, x: Tensor) -> None:
    """A half in a trace is plain operations, which the compiler fuses with what the caller does in between."""
    if backend == "triton":
        check_kernels(operator, plan.slots, plan, x)
        if torch.compiler.is_compiling():
            got = "'triton' inside torch.compile"
            raise fail(operator, "backend", got, "an eager call", 'Pass backend="auto", or compile lora_experts')


def lora_down(
    x_TD: Tensor, A: Tensor | Sequence[Tensor], plan: RoutePlan, *, backend: str = "auto"
) -> Tensor | tuple[Tensor, ...]:
    """Project every pair's token by its expert's A; several stacks share one read of x.

    Args:
        x_TD: [T, D] inputs.
        A: [E, L, D], or a sequence of such stacks (q, k, v) whose ranks may differ.
        plan: the routing.
        backend: "dense" is one GEMM over all experts; "triton" insists on the GPU kernels; "reference" is the plain
            definition; "auto" takes Triton on a GPU and never fails.

    Returns:
        [P, L] in the plan's given order, 0 for dropped pairs, in the wider dtype of x and A; a tuple for a sequence.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit, an unknown backend, or Triton where it
            cannot run (no GPU, free pairs, float64, inside torch.compile).
    """
    name = "lora_down"
    stacks = [A] if isinstance(A, Tensor) else list(A)
    check_float(name, "x_TD", x_TD, 2)
    check_backend(name, backend, HALF_BACKENDS)
    for a in stacks:
        check_float(name, "A_ELD", a, 3)
        check_shape(name, "A_ELD", a, (plan.num_experts, None, x_TD.shape[1]), "[E, L, D] with E of the plan, D of x")
        check_device(name, x_TD.device, A_ELD=a)
    check_plan_device(name, x_TD.device, plan)
    if x_TD.shape[0] != plan.num_tokens:
        raise fail(name, "rows of x", x_TD.shape[0], f"{plan.num_tokens}", "Build the plan from this routing")
    _check_triton(name, backend, plan, x_TD)
    if backend == "reference":
        H = tuple(lora_down_reference(x_TD, a, plan) for a in stacks)
    else:
        dtype = autocast_dtype(x_TD.device)
        if dtype is not None:
            x_TD, *stacks = cast_all([x_TD, *stacks], dtype)
        if torch.compiler.is_compiling():
            H = tuple(halves.down_traced(x_TD, a, plan) for a in stacks)
        else:
            with no_autocast(x_TD.device):
                H = halves.LoraDown.apply(backend, plan, x_TD, *stacks)
    return H[0] if isinstance(A, Tensor) else H


def lora_up(
    H_PL: Tensor,
    B_EOL: Tensor,
    plan: RoutePlan,
    weights: Tensor,
    *,
    scale: float = 1.0,
    base_TO: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Project every pair by its expert's B, weigh it and add it to its token's row.

    Args:
        H_PL: [P, L] in the plan's given order, as from `lora_down`.
        B_EOL: [E, O, L] up projections.
        plan: the routing.
        weights: [T, K] or [P] float32 weights; they get a gradient.
        scale: factor on the sum.
        base_TO: [T, O] result of the frozen layer; None adds nothing.
        backend: "dense" is one GEMM over all experts; "triton" insists on the GPU kernels; "reference" is the plain
            definition; "auto" takes Triton on a GPU and never fails.

    Returns:
        [T, O] in the dtype of the base, else of H.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit, an unknown backend, or Triton where it
            cannot run (no GPU, free pairs, float64, inside torch.compile).
    """
    name = "lora_up"
    check_float(name, "H_PL", H_PL, 2)
    check_float(name, "B_EOL", B_EOL, 3)
    check_backend(name, backend, HALF_BACKENDS)
    check_shape(name, "H_PL", H_PL, (plan.num_pairs, None), "[P, L] with P of the plan")
    check_shape(name, "B_EOL", B_EOL, (plan.num_experts, None, H_PL.shape[1]), "[E, O, L] with E of the plan, L of H")
    check_device(name, H_PL.device, B_EOL=B_EOL, weights=weights, base_TO=base_TO)
    check_decision(name, plan.num_tokens, plan.num_experts, Decision(None, weights, plan))
    if base_TO is not None:
        check_float(name, "base_TO", base_TO, 2)
        check_shape(name, "base_TO", base_TO, (plan.num_tokens, B_EOL.shape[1]), "[T, O]")
    _check_triton(name, backend, plan, H_PL)
    if backend == "reference":
        return lora_up_reference(H_PL, B_EOL, plan, weights, scale=scale, base_TO=base_TO)
    dtype = autocast_dtype(H_PL.device)
    if dtype is not None:
        H_PL, B_EOL = cast_all([H_PL, B_EOL], dtype)
    if torch.compiler.is_compiling():
        return halves.up_traced(H_PL, B_EOL, plan, weights, float(scale), base_TO)
    with no_autocast(H_PL.device):
        return halves.LoraUp.apply(backend, plan, float(scale), H_PL, B_EOL, weights, base_TO)
