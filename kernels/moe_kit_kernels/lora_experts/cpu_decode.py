"""Routed LoRA experts for a handful of tokens, forward only: no plan, no sort, no mask (the `decode` implementation).

    y_t = base_t + scale * sum_k w_tk B_e(t,k) (A_e(t,k) x_t)

A step of decoding is one to a few tokens, so its price is the number of calls and the bytes of the chosen experts.
Every pair reads its expert in place, by two matrix-vector products; nothing is copied. Gradients come from the other
implementations.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, addmv, mv
from torch.nn.functional import linear

from moe_kit_kernels.common.checks import fail
from moe_kit_kernels.lora_experts.cpu_columns import one_dtype


def decode(
    x_TD: Tensor,
    A_ELD: Tensor,
    B_EOL: Tensor,
    ids_TK: list[list[int]],
    weights_TK: Tensor,
    scale: float,
    base_TO: Tensor | None,
    overwrite: bool,
) -> Tensor:
    """Compute the forward without a plan.

    Args:
        x_TD: [T, D] inputs.
        A_ELD: [E, L, D] down projections.
        B_EOL: [E, O, L] up projections.
        ids_TK: [T, K] ids as Python integers; -1 and ids >= E are empty slots.
        weights_TK: [T, K] (or [T*K]) weights.
        scale: factor on the sum.
        base_TO: [T, O] or None.
        overwrite: write over `base_TO`.

    Returns:
        [T, O] in the dtype of the base, else of x.

    Raises:
        KernelError: an id below -1.
    """
    (T, _D), (E, O, _L) = x_TD.shape, B_EOL.shape
    K = len(ids_TK[0]) if T else 0
    chosen_T = _chosen("lora_experts", ids_TK, weights_TK.reshape(T, K).tolist(), scale, E)
    dtype = torch.promote_types(x_TD.dtype, A_ELD.dtype)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    out_dtype = x_TD.dtype if base_TO is None else base_TO.dtype
    if base_TO is None:
        y_TO = x_TD.new_zeros(T, O, dtype=sum_dtype)
    elif base_TO.dtype == sum_dtype:
        y_TO = base_TO if overwrite else base_TO.clone()
    else:
        y_TO = base_TO.to(sum_dtype)
    plain = one_dtype(x_TD, A_ELD, B_EOL, y_TO)
    for y_O, x_D, chosen in zip(y_TO.unbind(), x_TD.to(dtype).unbind(), chosen_T, strict=True):
        if plain:
            _add_chosen(y_O, x_D, A_ELD, B_EOL, chosen)
            continue
        for e, factor in chosen:
            G_L = mv(A_ELD[e].to(dtype), x_D).mul_(factor)
            y_O.add_(mv(B_EOL[e].to(dtype), G_L))
    if overwrite and base_TO is not None and y_TO is not base_TO:
        return base_TO.copy_(y_TO)
    return y_TO.to(out_dtype)


def decode_linears(
    x_TD: Tensor,
    weights_OD: Sequence[Tensor],
    biases_O: Sequence[Tensor | None],
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    ids_TK: list[list[int]],
    weights_TK: list[list[float]],
    scale: float,
) -> list[Tensor]:
    """Compute n linear layers with their experts over one input without gradients.

    The bases are computed in their own dtype, the experts and the sum in the widest dtype, float32 at least.

    Args:
        x_TD: [T, D] inputs.
        weights_OD: base weights [O_i, D] in the dtype of x.
        biases_O: base biases [O_i] or None.
        A: down projections [E, L_i, D], as stacks or as lists of experts; all experts have one dtype.
        B: up projections [E, O_i, L_i], as stacks or as lists of experts.
        ids_TK: [T, K] ids as Python integers; -1 and ids >= E are empty slots.
        weights_TK: [T, K] weights as Python floats.
        scale: factor on the sums.

    Returns:
        n results [T, O_i] in the dtype of x.

    Raises:
        KernelError: an id below -1.
    """
    chosen_T = _chosen("lora_linear", ids_TK, weights_TK, scale, len(A[0]))
    # to its own dtype a tensor is not copied
    given = x_TD.dtype
    dtype = torch.promote_types(torch.promote_types(given, A[0][0].dtype), torch.float32)
    results = [result.to(dtype) for result in base_products(x_TD, weights_OD, biases_O)]
    x_TD = x_TD.to(dtype)
    if len(chosen_T) == 1:
        x_D, chosen = x_TD.view(-1), chosen_T[0]
        return [_add_chosen(y_O, x_D, a, b, chosen).to(given).unsqueeze(0) for y_O, a, b in zip(results, A, B)]
    rows_T = x_TD.unbind()
    for y_TO, a_ELD, b_EOL in zip(results, A, B):
        for y_O, x_D, chosen in zip(y_TO.unbind(), rows_T, chosen_T):
            _add_chosen(y_O, x_D, a_ELD, b_EOL, chosen)
    return [result.to(given) for result in results]


def base_products(x_TD: Tensor, weights_OD: Sequence[Tensor], biases_O: Sequence[Tensor | None]) -> list[Tensor]:
    """Compute n linear layers of a few tokens; one token stays a vector, since at this size a view costs as much as a product.

    Args:
        x_TD: [T, D] inputs.
        weights_OD: base weights [O_i, D].
        biases_O: base biases [O_i] or None.

    Returns:
        n results [T, O_i]; [O_i] for one token.
    """
    if len(x_TD) != 1:
        return [linear(x_TD, weight_OD, bias_O) for weight_OD, bias_O in zip(weights_OD, biases_O)]
    x_D = x_TD.view(-1)
    return [
        mv(weight_OD, x_D) if bias_O is None else addmv(bias_O, weight_OD, x_D)
        for weight_OD, bias_O in zip(weights_OD, biases_O)
    ]


def _chosen(
    operator: str, ids_TK: list[list[int]], weights_TK: list[list[float]], scale: float, num_experts: int
) -> list[list[tuple[int, float]]]:
    """(expert, scale * weight) of each token's filled slots.

    Raises:
        KernelError: an id below -1.
    """
    lowest = min((e for ids in ids_TK for e in ids), default=0)
    if lowest < -1:
        raise fail(operator, "an expert id", lowest, "-1 or more", "Mark empty slots with -1")
    return [
        [(e, w * scale) for e, w in zip(ids, weights) if 0 <= e < num_experts]
        for ids, weights in zip(ids_TK, weights_TK, strict=True)
    ]


def _add_chosen(
    y_O: Tensor, x_D: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], chosen: list[tuple[int, float]]
) -> Tensor:
    """Add `sum_e factor_e B_e A_e x` to y in place."""
    dtype = y_O.dtype
    for e, factor in chosen:
        y_O.addmv_(b[e].to(dtype), mv(a[e].to(dtype), x_D), alpha=factor)
    return y_O
