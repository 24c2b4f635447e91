"""Grouped GEMM in C++ on the CPU, float32: `native.cpp`, compiled on first use.

It has the products of `cpu.py`, and the way back through an activation, which the feed-forward experts call. The products read rows where they lie.

Shapes: P pairs sorted by expert, E experts, D width in, O width out, F pre-activation width, H activation width.
"""

from pathlib import Path

import torch
from torch import Tensor

from moe_kit_kernels.common.native import Native, is_plain, is_watched
from moe_kit_kernels.grouped_mm.cpu import Steps
from moe_kit_kernels.route_plan import RoutePlan

# numbers of the activations in native.cpp; 0 is none
_ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}
# multiplications that are worth waking a second thread for (measured)
_WORK_A_THREAD = 1 << 19

_PAIRS = "offsets:int64[E+1] token:int64[P] order:int64[P]"
NATIVE = Native(
    Path(__file__).with_name("native.cpp"),
    moe_kit_grouped_rows=f"{_PAIRS} x:float32[rows*K] w:float32[E*N*K] bias?:float32[E*N] z?:float32[P*N] h?:float32[P*H] "
    "E:int64 P:int64 rows:int64 K:int64 N:int64 H:int64 by_token:int by_input:int add:int activation:int<=5 gated:int threads:int",
    moe_kit_grouped_through=f"{_PAIRS} dy:float32[T*D] v:float32[E*D*H] weights:float32[P] z:float32[P*N] dz?:float32[P*N] "
    "wh?:float32[P*H] dweights?:float32[P] E:int64 P:int64 T:int64 D:int64 H:int64 N:int64 by_input:int activation:int<=5 "
    "gated:int threads:int",
    moe_kit_grouped_sums=f"{_PAIRS} a:float32[rows_a*M] b:float32[rows_b*N] out:float32[E*M*N] E:int64 P:int64 rows_a:int64 "
    "rows_b:int64 M:int64 N:int64 a_by_token:int b_by_token:int threads:int",
)


def _lies(stack_EOD: Tensor) -> bool:
    """Tell whether a stack lies as [E, O, D] or as [E, D, O]."""
    return stack_EOD.is_contiguous() or stack_EOD.transpose(1, 2).is_contiguous()


def takes(stacks: tuple[Tensor, ...], *tensors: Tensor | None) -> bool:
    """Tell whether the C++ takes the tensors of a call.

    Args:
        stacks: the experts' matrices, [E, O, D] each.
        *tensors: all others; None is skipped.

    Returns:
        True for plain float32 tensors on the CPU, the stacks laid out as [E, O, D] or as [E, D, O], where the C++ runs.
    """
    return is_plain(*stacks, *tensors) and all(map(_lies, stacks)) and NATIVE.available


def serves(stacks: tuple[Tensor, ...], *tensors: Tensor | None) -> bool:
    """Tell whether the C++ should run a call in eager mode.

    Args:
        stacks: the experts' matrices, [E, O, D] each.
        *tensors: all others; None is skipped.

    Returns:
        True where it `takes` them, unless a dispatch mode looks on, which would see nothing.
    """
    return not is_watched() and takes(stacks, *tensors)


def check(operator: str, stacks: tuple[Tensor, ...], *tensors: Tensor | None) -> None:
    """Check that the C++ can run where it was asked for by name.

    Args:
        operator: public name, for messages.
        stacks: the experts' matrices, [E, O, D] each.
        *tensors: all others; None is skipped.

    Raises:
        KernelError: it does not take them, or does not run here.
    """
    if takes(stacks, *tensors):
        return
    strides = " and ".join(str(stack.stride()) for stack in stacks)
    wrong = None if all(map(_lies, stacks)) else (f"strides {strides}", "stacks [E, O, D] or [E, D, O]")
    raise NATIVE.refusal(operator, wrong, *stacks, *tensors)


def _pairs(plan: RoutePlan) -> tuple[Tensor, Tensor, Tensor]:
    """The plan's sorted pairs as the C++ reads them: offsets, tokens, and places in the given order."""
    return plan.offsets_E1, plan.sorted_token_P, plan.order_P


def _stack(weight_EOD: Tensor) -> Tensor:
    """The stack as it lies: [E, O, D], or [E, D, O]."""
    return weight_EOD if weight_EOD.is_contiguous() else weight_EOD.transpose(1, 2)


def threads_for(work: int) -> int:
    """Threads for so many multiplications.

    Args:
        work: multiplications of a call.
    """
    return min(torch.get_num_threads(), 1 + work // _WORK_A_THREAD)


def product(
    x: Tensor,
    weight_EOD: Tensor,
    plan: RoutePlan,
    *,
    gather: bool,
    bias_EO: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    keep: bool = False,
    into_PO: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply the rows of each expert by its matrix, and do what follows while they are in cache.

    Args:
        x: [T, D] tokens with `gather`, else [P, D] sorted rows.
        weight_EOD: [E, O, D], as `takes` wants it.
        plan: the routing.
        gather: x holds tokens.
        bias_EO: [E, O], optional.
        activation: None or a name in `activations.ACTIVATIONS`.
        gated: the activation of the first half multiplies the second.
        keep: return the pre-activations.
        into_PO: contiguous sorted rows to add to, in place; without an activation.

    Returns:
        [P, O] sorted rows ([P, O/2] when gated), zero for dropped pairs, and with `keep` the pre-activations [P, O].
    """
    O, D = weight_EOD.shape[1:]
    P, H = plan.num_pairs, O // 2 if gated else O
    x, bias_EO = x.contiguous(), None if bias_EO is None else bias_EO.contiguous()
    h_PH = None if activation is None else x.new_empty(P, H)
    z_PO = into_PO
    if z_PO is None and (keep or h_PH is None):
        z_PO = x.new_empty(P, O)
    NATIVE.functions.moe_kit_grouped_rows(
        *_pairs(plan),
        x,
        _stack(weight_EOD),
        bias_EO,
        z_PO,
        h_PH,
        plan.num_experts,
        P,
        plan.num_tokens if gather else P,
        D,
        O,
        H,
        gather,
        not weight_EOD.is_contiguous(),
        into_PO is not None,
        _ACTIVATIONS[activation],
        gated,
        threads_for(P * O * D),
    )
    _clear_dropped(plan, z_PO, h_PH)
    result = z_PO if h_PH is None else h_PH
    assert result is not None
    return result, z_PO if keep else None


def _clear_dropped(plan: RoutePlan, *sorted_rows: Tensor | None) -> None:
    """Write zeros to the rows of dropped pairs, which the C++ leaves out."""
    kept = plan.host_offsets[-1]
    for rows_P in sorted_rows:
        if rows_P is not None and kept < plan.num_pairs:
            rows_P[kept:] = 0


def through(
    dy_TD: Tensor,
    down_EDH: Tensor,
    weights_P: Tensor,
    z_PF: Tensor,
    plan: RoutePlan,
    activation: str,
    *,
    need_z: bool,
    need_h: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Go back through the second product of the feed-forward experts and their activation.

    Args:
        dy_TD: [T, D] gradient of the result.
        down_EDH: second stack, as `takes` wants it.
        weights_P: [P] in the given order.
        z_PF: pre-activations of the sorted rows.
        plan: the routing.
        activation: a name in `activations.ACTIVATIONS`.
        need_z: return the gradient of z.
        need_h: return the weighted activations.
        need_weights: return the gradient of the weights, a bias of the second stack left out.

    Returns:
        dz [P, F] and w h [P, H] of the sorted rows, dweights [P] in the given order; None where nobody needs it.
    """
    D, H = down_EDH.shape[1:]
    P, F = z_PF.shape
    dy_TD, weights_P, z_PF = dy_TD.contiguous(), weights_P.contiguous(), z_PF.contiguous()
    dz_PF = torch.empty_like(z_PF) if need_z else None
    wh_PH = z_PF.new_empty(P, H) if need_h else None
    # dropped pairs have none
    dweights_P = torch.zeros_like(weights_P) if need_weights else None
    NATIVE.functions.moe_kit_grouped_through(
        *_pairs(plan),
        dy_TD,
        _stack(down_EDH),
        weights_P,
        z_PF,
        dz_PF,
        wh_PH,
        dweights_P,
        plan.num_experts,
        P,
        plan.num_tokens,
        D,
        H,
        F,
        # back through V: a matrix of H outputs over D inputs
        down_EDH.is_contiguous(),
        _ACTIVATIONS[activation],
        F == 2 * H,
        threads_for(P * D * H),
    )
    _clear_dropped(plan, dz_PF, wh_PH)
    return dz_PF, wh_PH, dweights_P


def sums(a: Tensor, b: Tensor, like_EOD: Tensor, plan: RoutePlan, *, gather: tuple[bool, bool]) -> Tensor:
    """Sum the outer products of every expert's rows: the gradient of its matrix.

    Args:
        a: [P, O] sorted rows, or [T, O] tokens.
        b: [P, D] sorted rows, or [T, D] tokens.
        like_EOD: the stack, as `takes` wants it; the result is laid out like it.
        plan: the routing.
        gather: whether a and b hold tokens.

    Returns:
        [E, O, D], zeros for experts without rows.
    """
    O, D = like_EOD.shape[1:]
    out_EOD = torch.empty_like(like_EOD)
    a, b = a.contiguous(), b.contiguous()
    work = plan.num_pairs * O * D + like_EOD.numel()
    if not like_EOD.is_contiguous():
        a, b, O, D, gather = b, a, D, O, gather[::-1]
    rows = [plan.num_tokens if of_tokens else plan.num_pairs for of_tokens in gather]
    NATIVE.functions.moe_kit_grouped_sums(
        *_pairs(plan),
        a,
        b,
        _stack(out_EOD),
        plan.num_experts,
        plan.num_pairs,
        *rows,
        O,
        D,
        *gather,
        threads_for(work),
    )
    return out_EOD


def grad_input(dz_PO: Tensor, weight_EOD: Tensor, plan: RoutePlan) -> Tensor:
    """Return `dz W_e` of sorted rows, `[P, D]`."""
    return product(dz_PO, weight_EOD.transpose(1, 2), plan, gather=False)[0]


def gram(dz_PO: Tensor, x: Tensor, like_EOD: Tensor, plan: RoutePlan, gather: bool) -> Tensor:
    """Return `dz^T x` of every expert, `[E, O, D]`; x holds tokens with `gather`."""
    return sums(dz_PO, x, like_EOD, plan, gather=(False, gather))


STEPS = Steps(product, grad_input, gram)
