"""Grouped GEMM on the CPU: one library GEMM an expert with rows, written straight into the result.

    Z_PO[run e] = X_PD[run e] W_e^T;   dX = dZ W_e;   dW_e = dZ[run e]^T X[run e], every expert written, empty ones with 0

An expert often has few rows, and there the library's plain call is slow. Three other forms of the same product are used
in the windows where they measured faster (fp32, AVX-512, widths 256 to 2048):

* `X W^T` with 9 to 48 rows as `(W X^T)^T`, which streams W in its stored order: 1.2 to 2 times as fast;
* `dZ W` with 24 to 96 rows and several threads as a batch of two column halves, one a thread: 1.1 to 1.4 times;
* `dZ^T X` with 33 to 64 rows as two accumulated products of at most 32 rows: about 1.15 times.

With at most 8 rows an expert on average and most experts in use, calls cost as much as products, and one call of torch's own
`grouped_mm` loops faster than Python does.

Shapes: n rows of one expert, P pairs sorted by expert, E experts, D width in, O width out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

try:
    from torch.nn.functional import grouped_mm
except ImportError:  # torch before 2.10
    grouped_mm = None

from moe_kit_kernels.grouped_mm.activations import activate
from moe_kit_kernels.route_plan import RoutePlan

# row counts of the three windows; see the module docstring
SWAP_ROWS = range(9, 49)
HALVES_ROWS = range(24, 97)
CHUNK_ROWS = range(33, 65)
# mean rows of an expert up to which torch's grouped_mm makes the products in one call
FEW_ROWS = 8
_CHUNK = 32
# below this many elements one small bmm beats the embedding kernel's call
_SMALL_COMBINE = 64 * 512


def linear(x_nD: Tensor, weight_OD: Tensor) -> Tensor:
    """Return `x W^T`, `[n, O]`; for few rows it is a transposed view of `(W x^T)`."""
    if x_nD.shape[0] in SWAP_ROWS and weight_OD.stride(1) == 1 and x_nD.dtype is torch.float32:
        return torch.mm(weight_OD, x_nD.t()).t()
    return torch.mm(x_nD, weight_OD.t())


def linear_into(x_nD: Tensor, weight_OD: Tensor, out_nO: Tensor) -> None:
    """Write `x W^T` to `out_nO`."""
    if x_nD.shape[0] in SWAP_ROWS and weight_OD.stride(1) == 1 and x_nD.dtype is torch.float32:
        out_nO.copy_(torch.mm(weight_OD, x_nD.t()).t())
    else:
        torch.mm(x_nD, weight_OD.t(), out=out_nO)


def input_into(dz_nO: Tensor, weight_OD: Tensor, out_nD: Tensor) -> None:
    """Write `dz W` to `out_nD`."""
    n, D = out_nD.shape
    if (
        n in HALVES_ROWS
        and D % 2 == 0
        and weight_OD.stride(1) == 1
        and dz_nO.dtype is torch.float32
        and torch.get_num_threads() > 1
    ):
        halves_2OD = weight_OD.unflatten(1, (2, D // 2)).transpose(0, 1)
        halves_2nD = torch.bmm(dz_nO.expand(2, *dz_nO.shape), halves_2OD)
        out_nD.unflatten(1, (2, D // 2)).copy_(halves_2nD.transpose(0, 1))
    else:
        torch.mm(dz_nO, weight_OD, out=out_nD)


def product_into(dz_nO: Tensor, x_nD: Tensor, out_OD: Tensor) -> None:
    """Write `dz^T x` to `out_OD`, in whichever order its memory is laid out."""
    if out_OD.stride(1) != 1:
        dz_nO, x_nD, out_OD = x_nD, dz_nO, out_OD.t()
    if dz_nO.shape[0] in CHUNK_ROWS and dz_nO.dtype is torch.float32:
        torch.mm(dz_nO[:_CHUNK].t(), x_nD[:_CHUNK], out=out_OD)
        out_OD.addmm_(dz_nO[_CHUNK:].t(), x_nD[_CHUNK:])
    else:
        torch.mm(dz_nO.t(), x_nD, out=out_OD)


def _one_call(plan: RoutePlan, *operands: Tensor) -> bool:
    """Return whether torch's grouped_mm takes these operands and its one call pays: few rows in most experts."""
    if grouped_mm is None or plan.num_pairs > FEW_ROWS * plan.num_experts:
        return False
    if 2 * len(experts_with_rows(plan)) < plan.num_experts:
        return False
    # it asks for contiguous last dimensions, rows of whole 16-byte steps, and half or single precision
    return all(
        t.is_contiguous() and t.dtype != torch.float64 and t.shape[-1] * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0 for t in operands
    )  # fmt: skip


def experts_with_rows(plan: RoutePlan) -> list[int]:
    """Return the experts that have rows, ascending."""
    offsets = plan.host_offsets
    return [e for e in range(plan.num_experts) if offsets[e + 1] > offsets[e]]


def split_rows(rows: Tensor, plan: RoutePlan, experts: Sequence[int]) -> Sequence[Tensor]:
    """Return the rows of each of `experts` as views, in one call."""
    offsets = plan.host_offsets
    sizes = [offsets[e + 1] - offsets[e] for e in experts]
    return rows.split([*sizes, rows.shape[0] - sum(sizes)])


def pick(stack: Tensor, experts: Sequence[int]) -> Iterator[Tensor]:
    """Yield `stack[e]` of every expert; one call makes all views where most are used."""
    if 2 * len(experts) > stack.shape[0]:
        views = stack.unbind(0)
        return (views[e] for e in experts)
    return (stack[e] for e in experts)


def clear_others(stack: Tensor, experts: Sequence[int]) -> None:
    """Write zero to the entries of experts without rows, one fill for each run of neighbours."""
    start = 0
    for e in [*experts, stack.shape[0]]:
        if e > start:
            stack[start:e].zero_()
        start = e + 1


def forward(x_PD: Tensor, weight_EOD: Tensor, plan: RoutePlan, bias_EO: Tensor | None = None) -> Tensor:
    """Return `x W_e^T + b_e` of sorted rows, `[P, O]`; rows of dropped pairs are zero."""
    experts = experts_with_rows(plan)
    if bias_EO is None and _one_call(plan, x_PD, weight_EOD) and weight_EOD.shape[1] * x_PD.element_size() % 16 == 0:
        z_PO = grouped_mm(x_PD, weight_EOD.transpose(1, 2), offs=plan.ends_E)
        z_PO[plan.host_offsets[-1] :] = 0
        return z_PO
    z_PO = x_PD.new_empty(x_PD.shape[0], weight_EOD.shape[1])
    rows = zip(split_rows(x_PD, plan, experts), pick(weight_EOD, experts), split_rows(z_PO, plan, experts), experts)
    for x_nD, weight_OD, z_nO, e in rows:
        linear_into(x_nD, weight_OD, z_nO)
        if bias_EO is not None:
            z_nO += bias_EO[e]
    z_PO[plan.host_offsets[-1] :] = 0
    return z_PO


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
) -> tuple[Tensor, Tensor | None]:
    """Return `act(x W_e^T + b_e)` of sorted rows and, with `keep`, the pre-activations; x holds tokens with `gather`."""
    z_PF = forward(x.index_select(0, plan.sorted_token_P) if gather else x, weight_EOD, plan, bias_EO)
    return z_PF if activation is None else activate(z_PF, activation, gated), z_PF if keep else None


@dataclass(frozen=True)
class Steps:
    """The three steps of `autograd.py` over an implementation's products."""

    product: Callable[..., tuple[Tensor, Tensor | None]]
    """As `product`."""
    grad_input: Callable[[Tensor, Tensor, RoutePlan], Tensor]
    """As `grad_input`."""
    gram: Callable[[Tensor, Tensor, Tensor, RoutePlan, bool], Tensor]
    """As `gram`."""

    def rows(
        self,
        x: Tensor,
        weight_EOD: Tensor,
        plan: RoutePlan,
        *,
        scatter: bool,
        weights_P: Tensor | None,
        residual: Tensor | None,
        **how: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the operator's result `[P, O]` and, with `keep`, the pre-activations in sorted order; `how` is for `product`."""
        y_PO, z_PF = self.product(x, weight_EOD, plan, **how)
        if weights_P is not None:
            w_P1 = weights_P.index_select(0, plan.order_P)[:, None]
            y_PO = (y_PO * w_P1).to(y_PO.dtype)
            # the weights of dropped pairs may be NaN
            y_PO[plan.host_offsets[-1] :] = 0
        if scatter:
            y_PO = y_PO.index_select(0, plan.inverse_P)
        if residual is not None:
            y_PO = (y_PO + residual).to(y_PO.dtype)
        return y_PO, z_PF

    def grad_rows(self, dz_PF: Tensor, weight_EOD: Tensor, plan: RoutePlan, gather: bool) -> Tensor:
        """Return `dx`: by token (summed over its rows) with `gather`, else sorted."""
        dx_PD = self.grad_input(dz_PF, weight_EOD, plan)
        return combine(dx_PD, plan) if gather else dx_PD

    def grad_stacks(
        self,
        dz_PF: Tensor,
        x: Tensor,
        weight_EOD: Tensor,
        plan: RoutePlan,
        gather: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the weight and of the bias, each where it is needed."""
        dw = self.gram(dz_PF, x, weight_EOD, plan, gather) if need_weight else None
        return dw, grad_bias(dz_PF, plan) if need_bias else None


def gram(dz_PO: Tensor, x: Tensor, like_EOD: Tensor, plan: RoutePlan, gather: bool) -> Tensor:
    """Return `dz^T x` of every expert, `[E, O, D]`; x holds tokens with `gather`."""
    return grad_weight(dz_PO, x.index_select(0, plan.sorted_token_P) if gather else x, like_EOD, plan)


def grad_input(dz_PO: Tensor, weight_EOD: Tensor, plan: RoutePlan) -> Tensor:
    """Return `dz W_e` of sorted rows, `[P, D]`; rows of dropped pairs are zero."""
    if _one_call(plan, dz_PO, weight_EOD):
        dx_PD = grouped_mm(dz_PO, weight_EOD, offs=plan.ends_E)
        dx_PD[plan.host_offsets[-1] :] = 0
        return dx_PD
    dx_PD = dz_PO.new_empty(dz_PO.shape[0], weight_EOD.shape[2])
    experts = experts_with_rows(plan)
    rows = zip(split_rows(dz_PO, plan, experts), pick(weight_EOD, experts), split_rows(dx_PD, plan, experts))
    for dz_nO, weight_OD, dx_nD in rows:
        input_into(dz_nO, weight_OD, dx_nD)
    dx_PD[plan.host_offsets[-1] :] = 0
    return dx_PD


def grad_weight(dz_PO: Tensor, x_PD: Tensor, weight_EOD: Tensor, plan: RoutePlan) -> Tensor:
    """Return `dz^T x` of every expert's run, `[E, O, D]` in the memory layout of `weight_EOD`."""
    if _one_call(plan, dz_PO, x_PD, weight_EOD):
        # experts without rows get zeros
        return grouped_mm(dz_PO.t(), x_PD, offs=plan.ends_E)
    dw_EOD = torch.empty_like(weight_EOD)
    experts = experts_with_rows(plan)
    rows = zip(split_rows(dz_PO, plan, experts), split_rows(x_PD, plan, experts), pick(dw_EOD, experts))
    for dz_nO, x_nD, dw_OD in rows:
        product_into(dz_nO, x_nD, dw_OD)
    clear_others(dw_EOD, experts)
    return dw_EOD


def grad_bias(dz_PO: Tensor, plan: RoutePlan) -> Tensor:
    """Return the sum of every expert's rows, `[E, O]`."""
    db_EO = dz_PO.new_zeros(plan.num_experts, dz_PO.shape[1])
    experts = experts_with_rows(plan)
    for e, dz_nO in zip(experts, split_rows(dz_PO, plan, experts)):
        torch.sum(dz_nO, 0, out=db_EO[e])
    return db_EO


def combine(y_PO: Tensor, plan: RoutePlan, weights_P: Tensor | None = None) -> Tensor:
    """Sum every token's rows, each times its weight, in at least float32 and in slot order.

    Args:
        y_PO: Rows in sorted order; rows of dropped pairs finite.
        plan: The routing.
        weights_P: Weights in the given order; None = 1. Those of dropped pairs may be anything, NaN too.

    Returns:
        `[T, O]` of `y_PO`'s dtype.
    """
    T, O = plan.num_tokens, y_PO.shape[1]
    dtype = y_PO.dtype
    if plan.num_pairs == 0:
        return y_PO.new_zeros(T, O)
    wide = torch.promote_types(dtype, torch.float32)
    if weights_P is not None:
        weights_P = weights_P.to(wide)
        if plan.host_offsets[-1] < plan.num_pairs:
            weights_P = weights_P.masked_fill(plan.expert_P == plan.num_experts, 0)
    if plan.slots is not None and y_PO.numel() <= _SMALL_COMBINE:
        y_TKO = y_PO.index_select(0, plan.inverse_P).view(T, plan.slots, O).to(wide)
        if weights_P is None:
            return y_TKO.sum(1).to(dtype)
        return torch.bmm(weights_P.view(T, 1, plan.slots), y_TKO).view(T, O).to(dtype)
    # one pass over y: every bag is a token, its entries are the sorted positions of the token's pairs
    if plan.slots is not None:
        entries, offsets = plan.inverse_P.view(T, plan.slots), None
        weights = None if weights_P is None else weights_P.view(T, plan.slots)
    else:
        entries, offsets = plan.inverse_P.index_select(0, plan.token_order_P), plan.token_offsets_T1[:-1]
        weights = None if weights_P is None else weights_P.index_select(0, plan.token_order_P)
    return embedding_bag(entries, y_PO.to(wide), offsets, mode="sum", per_sample_weights=weights).to(dtype)


STEPS = Steps(product, grad_input, gram)
