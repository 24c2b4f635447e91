"""Choice and call of an implementation of LoRA experts, after the arguments were checked.

Without gradients the plain functions run and no autograd function is entered: at one token its bookkeeping costs more
than the mathematics. Decode builds no plan either.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kit_kernels.common.autocast import autocast_dtype, cast_all, no_autocast
from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.common.native import is_plain
from moe_kit_kernels.lora_experts import cpu, cpu_columns, cpu_linears, cpu_pairs, native, ops  # noqa: F401 (ops registers the operators)
from moe_kit_kernels.lora_experts.autograd import DenseLoraGroup, Group, dense_forward
from moe_kit_kernels.lora_experts.call import Call
from moe_kit_kernels.lora_experts.choice import choose, chosen_form, for_kernels, of_pairs, on_kernels
from moe_kit_kernels.lora_experts.cpu_decode import decode, decode_linears
from moe_kit_kernels.lora_experts.cpu_single import SingleLora
from moe_kit_kernels.lora_experts.cpu_sorted import SortedLora
from moe_kit_kernels.lora_experts.decision import (
    Decision,
    all_experts_plan,
    check_decision,
    gates_of_table,
    resolve_plan,
)
from moe_kit_kernels.lora_experts.forms import FORMS
from moe_kit_kernels.lora_experts.gpu import linear_fuses, run_triton, uses_triton
from moe_kit_kernels.lora_experts.reference import lora_experts_reference
from moe_kit_kernels.route_plan import RoutePlan

# up to so many numbers [T, E*L] autograd's own forty calls are cheaper than a gradient in Python; it keeps two such tensors in
# place of H [P, L], together 128 KB in float32
_FEW_COLUMNS = 1 << 14


def run_experts(
    operator: str,
    backend: str,
    decision: Decision,
    scale: float,
    x_TD: Tensor,
    base_TO: Tensor | None,
    A_ELD: Tensor,
    B_EOL: Tensor,
    *,
    overwrite_base: bool,
) -> Tensor:
    """Run one bank of experts over one input.

    Args:
        operator: public name, for messages.
        backend: "auto", "native", "dense", "sorted", "decode", "triton" or "reference".
        decision: the routing.
        scale: factor on the sum.
        x_TD: [T, D] inputs.
        base_TO: [T, O] or None.
        A_ELD: [E, L, D] down projections.
        B_EOL: [E, O, L] up projections.
        overwrite_base: write over `base_TO`.

    Returns:
        [T, O].

    Raises:
        KernelError: sizes of the routing disagree, ids below -1, or decode with gradients.
    """
    (T, D), (E, O, L) = x_TD.shape, B_EOL.shape
    weights = decision.weights
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x_TD, A_ELD, B_EOL, weights, base_TO)
    )
    insisted = backend == "triton"
    if insisted:
        decision, backend = for_kernels(operator, T, E, decision, x_TD), "auto"
    everyone = decision.ids_TK is None and decision.plan is None
    if torch.compiler.is_compiling() and backend != "reference":
        return _traced(operator, backend, decision, scale, x_TD, base_TO, A_ELD, B_EOL)
    dtype = autocast_dtype(x_TD.device)
    if backend == "native":
        native.check(operator, L, x_TD, A_ELD, B_EOL, weights, base_TO)
    elif backend == "auto":
        compiled = _compiled(x_TD, L, x_TD, A_ELD, B_EOL, weights, base_TO)
        sizes = (T, weights.numel(), E, L, D, O, x_TD.element_size())
        no_decode = training or of_pairs(decision)
        backend = "dense" if everyone else choose(*sizes, no_decode, x_TD.device, False, compiled)
    if backend == "native":
        return _single(operator, backend, decision, scale, x_TD, base_TO, A_ELD, B_EOL, training, overwrite_base)
    if backend == "decode" and training:
        raise fail(operator, "backend", "'decode' with gradients on", "no gradient", 'Use "auto", or torch.no_grad()')

    if dtype is not None and backend != "reference":
        x_TD, A_ELD, B_EOL = cast_all([x_TD, A_ELD, B_EOL], dtype)
        backend = "triton" if insisted else backend
        with no_autocast(x_TD.device):
            return run_experts(
                operator, backend, decision, scale, x_TD, base_TO, A_ELD, B_EOL, overwrite_base=overwrite_base
            )

    if backend != "reference" and uses_triton(x_TD.device):
        if on_kernels(decision, x_TD):
            plan = resolve_plan(operator, T, E, decision)
            assert plan is not None
            return run_triton(backend, plan, scale, x_TD, weights, base_TO, A_ELD, B_EOL)
        # plain GEMMs, which run on every device and in every dtype
        backend = "dense"
    if backend == "decode" and decision.plan is None and decision.ids_TK is not None:
        check_decision(operator, T, E, decision)
        return decode(x_TD, A_ELD, B_EOL, decision.ids_TK.tolist(), weights, scale, base_TO, overwrite_base)
    if backend == "dense" and cpu_columns.one_dtype(x_TD, weights, base_TO, A_ELD, B_EOL):
        return _single(operator, backend, decision, scale, x_TD, base_TO, A_ELD, B_EOL, training, overwrite_base)
    plan = resolve_plan(operator, T, E, decision)
    if backend == "dense":
        group = Group(plan, scale, 1, linear=False, overwrite_base=overwrite_base)
        tensors = (base_TO, None, A_ELD, B_EOL)
        if not training:
            return dense_forward(group, x_TD, weights, tensors, keep=False)[0][0]
        return DenseLoraGroup.apply(group, x_TD, weights, *tensors)[0]
    plan = plan or all_experts_plan(T, E, x_TD.device)
    if backend == "reference":
        return lora_experts_reference(x_TD, A_ELD, B_EOL, plan, weights, scale=scale, base_TO=base_TO)
    if backend == "decode":
        if plan.slots is None:
            raise fail(operator, "backend", "'decode' with free pairs", "a [T, K] table", 'Use backend="auto"')
        ids = plan.expert_P.view(T, plan.slots).tolist()
        return decode(x_TD, A_ELD, B_EOL, ids, weights, scale, base_TO, overwrite_base)
    return SortedLora.apply(plan, scale, overwrite_base, x_TD, weights, base_TO, A_ELD, B_EOL)


def _single(
    operator: str,
    how: str,
    decision: Decision,
    scale: float,
    x_TD: Tensor,
    base_TO: Tensor | None,
    A_ELD: Tensor,
    B_EOL: Tensor,
    training: bool,
    overwrite_base: bool,
) -> Tensor:
    """One bank in one of the forms, as plain operations or as one autograd function."""
    T, (E, L, _), weights = x_TD.shape[0], A_ELD.shape, decision.weights
    if how == "native" and not training and _few(decision):
        check_decision(operator, T, E, decision)
        more = (scale, x_TD, weights, base_TO, A_ELD, B_EOL)
        return native.add_table(operator, decision.ids_TK, *more, owned=overwrite_base)
    if how == "dense" and (not training or (T * E * L <= _FEW_COLUMNS and cpu.is_one_run(B_EOL, T))):
        gates_TE = gates_of_table(operator, T, E, decision)
        if gates_TE is not None:
            return cpu_columns.add_table(gates_TE, scale, x_TD, base_TO, A_ELD, B_EOL, owned=overwrite_base)
    plan = _plan_for(how, operator, T, E, decision)
    if training:
        return SingleLora.apply(how, plan, scale, overwrite_base, x_TD, weights, base_TO, A_ELD, B_EOL)
    call = Call(plan, scale, x_TD, weights, (A_ELD,), (B_EOL,))
    return FORMS[how].add(call, (base_TO,), keep=False, owned=overwrite_base)[0][0]


def _few(decision: Decision) -> bool:
    """Whether a routing is a table of so few pairs that the C++ sorts them on its way."""
    return decision.plan is None and decision.ids_TK is not None and native.is_few(decision.ids_TK)


def _plan_for(how: str, operator: str, T: int, E: int, decision: Decision) -> RoutePlan | None:
    """The plan of a call; the C++ has one also when every expert is chosen."""
    plan = resolve_plan(operator, T, E, decision)
    return all_experts_plan(T, E, decision.weights.device) if plan is None and how == "native" else plan


def _compiled(x_TD: Tensor, rank: int, *tensors: Tensor | None) -> bool:
    """Whether the C++ may run a call on the device of x with some tensors."""
    plain = autocast_dtype(x_TD.device) is None and not uses_triton(x_TD.device)
    return plain and native.serves(rank, *tensors)


def _compiled_linears(x_TD: Tensor, rank: int, bases: Sequence[Tensor], *others: Tensor) -> bool:
    """Whether the C++ may run the experts of linears, which may be half where the experts are float32."""
    dtype = x_TD.dtype
    plain = is_plain(x_TD, *bases, dtype=dtype) and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return plain and _compiled(x_TD, rank, *others)


def _traced(
    operator: str,
    backend: str,
    decision: Decision,
    scale: float,
    x_TD: Tensor,
    base_TO: Tensor | None,
    A_ELD: Tensor,
    B_EOL: Tensor,
) -> Tensor:
    """One opaque node of the graph; decode reads ids on the host, so a trace lets the operator choose instead."""
    check_decision(operator, x_TD.shape[0], A_ELD.shape[0], decision)
    plan, weights = decision.plan, decision.weights
    dtype = autocast_dtype(x_TD.device)
    if dtype is not None:
        x_TD, A_ELD, B_EOL = cast_all([x_TD, A_ELD, B_EOL], dtype)
    ids, token_P = decision.ids_TK, None
    if plan is not None:
        token_P = plan.free_token_P
        ids = plan.expert_P if plan.slots is None else plan.expert_P.view(plan.num_tokens, plan.slots)
    how = "auto" if backend == "decode" else backend
    return torch.ops.moe_kit.lora_experts(x_TD, A_ELD, B_EOL, ids, token_P, weights, base_TO, scale, how)[0]


def run_linears(
    operator: str,
    backend: str,
    decision: Decision,
    scale: float,
    x_TD: Tensor,
    weights_OD: Sequence[Tensor],
    biases_O: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Run n linear layers with their experts over one input under one routing.

    Args:
        operator: public name, for messages.
        backend: "auto", "native", "dense", "sorted", "decode", "triton" or "reference".
        decision: the routing.
        scale: factor on the adapters' sums.
        x_TD: [T, D] inputs.
        weights_OD: base weights [O_i, D].
        biases_O: base biases [O_i] or None.
        A: down projections [E, L_i, D].
        B: up projections [E, O_i, L_i].

    Returns:
        n results [T, O_i].

    Raises:
        KernelError: sizes of the routing disagree, ids below -1, or decode with gradients.
    """
    (T, D), E = x_TD.shape, A[0].shape[0]
    insisted = backend == "triton"
    if insisted:
        decision, backend = for_kernels(operator, T, E, decision, x_TD), "auto"
    everyone = decision.ids_TK is None and decision.plan is None
    compiling = torch.compiler.is_compiling()
    if compiling and backend != "reference":
        # the compiler sees the base product; only the experts are opaque
        bases = [torch.nn.functional.linear(x_TD, w, bias) for w, bias in zip(weights_OD, biases_O, strict=True)]
        return tuple(
            _traced(operator, backend, decision, scale, x_TD, base_TO, a, b)
            for base_TO, a, b in zip(bases, A, B, strict=True)
        )
    rank, width = max(a.shape[1] for a in A), sum(w.shape[0] for w in weights_OD)
    dtype = autocast_dtype(x_TD.device)
    if backend == "native":
        native.check(operator, rank, x_TD, decision.weights, *weights_OD, *A, *B)
    elif backend == "auto":
        compiled = _compiled_linears(x_TD, rank, weights_OD, decision.weights, *A, *B)
        forward_only = not torch.is_grad_enabled() and not of_pairs(decision)
        sizes = (T, decision.weights.numel(), E, rank, D, width, x_TD.element_size())
        backend = "dense" if everyone else choose(*sizes, not forward_only, x_TD.device, native=compiled)
    if backend == "native" and not torch.is_grad_enabled() and _few(decision):
        check_decision(operator, T, E, decision)
        call = (operator, decision.ids_TK, scale, x_TD.float(), decision.weights)
        bases = [
            torch.nn.functional.linear(x_TD, w, bias).float() for w, bias in zip(weights_OD, biases_O, strict=True)
        ]
        parts = zip(bases, A, B, strict=True)
        return tuple(native.add_table(*call, base, a, b, owned=True).to(x_TD.dtype) for base, a, b in parts)
    if backend == "decode" and decision.ids_TK is not None and not compiling:
        plain = not torch.is_grad_enabled() and not uses_triton(x_TD.device) and autocast_dtype(x_TD.device) is None
        if plain and cpu_linears.fits(x_TD, decision.weights, weights_OD, A, B):
            check_decision(operator, T, E, decision)
            ids, weights = decision.ids_TK.tolist(), decision.weights.tolist()
            return tuple(decode_linears(x_TD, weights_OD, biases_O, A, B, ids, weights, scale))
    here = dtype is None and backend in ("dense", "sorted") and not uses_triton(x_TD.device)
    if backend == "native" or (here and cpu_linears.fits(x_TD, decision.weights, weights_OD, A, B)):
        tensors = [*weights_OD, *biases_O, *A, *B]
        if backend == "dense" and not torch.is_grad_enabled():
            gates_TE = gates_of_table(operator, T, E, decision)
            plan = None if gates_TE is not None else resolve_plan(operator, T, E, decision)
            weights = decision.weights if gates_TE is None else gates_TE
            return tuple(cpu_linears.forward(backend, plan, scale, x_TD, weights, tensors, False)[0])
        plan = _plan_for(backend, operator, T, E, decision)
        if backend != "sorted" or (plan is not None and cpu_pairs.fits(x_TD, weights_OD, A)):
            if torch.is_grad_enabled():
                return cpu_linears.RoutedLinears.apply(backend, plan, scale, x_TD, decision.weights, *tensors)
            return tuple(cpu_linears.forward(backend, plan, scale, x_TD, decision.weights, tensors, False)[0])
    fuses = apart = False
    if backend == "dense" and uses_triton(x_TD.device):
        plan, kernels = resolve_plan(operator, T, E, decision), on_kernels(decision, x_TD)
        fuses = kernels and linear_fuses(plan, A, dtype, [w.shape[0] for w in weights_OD])
        apart = kernels and not fuses
        if not everyone:
            decision = Decision(None, decision.weights, plan)
    if backend != "dense" or apart or (insisted and not fuses):
        # the base product stays the vendor's; the experts are added into it
        if decision.plan is None and not everyone and backend != "decode":
            decision = Decision(None, decision.weights, resolve_plan(operator, T, E, decision))
        results = []
        backend = "triton" if insisted else backend
        for w, bias, a, b in zip(weights_OD, biases_O, A, B, strict=True):
            base_TO = torch.nn.functional.linear(x_TD, w, bias)
            fresh = backend != "reference"
            results.append(run_experts(operator, backend, decision, scale, x_TD, base_TO, a, b, overwrite_base=fresh))
        return tuple(results)

    plan = resolve_plan(operator, T, E, decision)
    if fuses:
        from moe_kit_kernels.lora_experts.triton_autograd import TritonLora

        parts = zip(weights_OD, biases_O, A, B, strict=True)
        return tuple(TritonLora.apply("dense", plan, scale, True, x_TD, decision.weights, *part) for part in parts)
    group = Group(plan, scale, len(A), linear=True)
    tensors = [*weights_OD, *biases_O, *A, *B]
    if dtype is not None:
        x_TD, *tensors = cast_all([x_TD, *tensors], dtype)
        with no_autocast(x_TD.device):
            return DenseLoraGroup.apply(group, x_TD, decision.weights, *tensors)
    if not torch.is_grad_enabled():
        return tuple(dense_forward(group, x_TD, decision.weights, tensors, keep=False)[0])
    return DenseLoraGroup.apply(group, x_TD, decision.weights, *tensors)


def run_gated_linears(
    k: int,
    scale: float,
    x_TD: Tensor,
    router_ED: Tensor,
    weights_OD: Sequence[Tensor],
    biases_O: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
) -> tuple[Tensor, ...] | None:
    """Route one input by a linear router and run n linear layers with their experts, where one operator does both.

    Args:
        k: K, experts a token.
        scale: factor on the adapters' sums.
        x_TD: [T, D] inputs.
        router_ED: [E, D] weight of the router; weights are the softmax of the K best logits.
        weights_OD: base weights [O_i, D].
        biases_O: base biases [O_i] or None.
        A: down projections [E, L_i, D].
        B: up projections [E, O_i, L_i].

    Returns:
        Logits [T, E], ids [T, K], weights [T, K] and n results [T, O_i]; or None where `run_linears` must do it: in a
        trace, on an accelerator, under autocast, in other dtypes than `cpu_linears.fits` names, or for a token or two without gradients.
    """
    if torch.compiler.is_compiling() or x_TD.device.type != "cpu":
        return None
    if uses_triton(x_TD.device) or autocast_dtype(x_TD.device) is not None:
        return None
    T, E = x_TD.shape[0], A[0].shape[0]
    width = sum(w.shape[0] for w in weights_OD)
    if not cpu_linears.fits(x_TD, router_ED, weights_OD, A, B) or k > E:
        return None
    training = torch.is_grad_enabled()
    sizes = (T * k, E, A[0].shape[1], width)
    how = chosen_form(x_TD, *sizes, training=training)
    if how == "decode":
        return None
    if _compiled_linears(x_TD, A[0].shape[1], weights_OD, router_ED, *A, *B):
        how = chosen_form(x_TD, *sizes, training=training, native=True)
    if how == "sorted" and not cpu_pairs.fits(x_TD, weights_OD, A):
        return None
    tensors = (*weights_OD, *biases_O, *A, *B)
    if not training:
        return cpu_linears.gated_forward(how, k, scale, x_TD, router_ED, tensors)
    return cpu_linears.GatedLinears.apply(how, k, scale, x_TD, router_ED, *tensors)
