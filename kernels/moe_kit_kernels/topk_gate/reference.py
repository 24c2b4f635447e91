"""Top-k gating in the plainest PyTorch: the definition of `topk_gate`.

    s = softmax(logits) or sigmoid(logits)            over experts, in float32
    c = s + bias, or the logits if there is no bias and no group limit (same order, no ties made by rounding)
    group limit: a group is worth the sum of its two largest c; only the best `top_groups` groups may be chosen from
    ids = the K largest c, best first, equal values to the lowest index
    w   = s[ids], divided by their sum (+ 1e-20) if renormalised, times `scale`

The bias steers the choice and never enters a weight.

Legend: T tokens, K slots a token, E experts.

Sources: top-k softmax gating (arXiv 1701.06538); bias for the choice only (arXiv 2408.15664); sigmoid scores and the
group limit of DeepSeek-V3 (arXiv 2412.19437).
"""

from typing import NamedTuple

import torch
from torch import Tensor

# keeps a row whose scores all underflow from dividing by zero; far below any sum that matters
EPSILON = 1e-20


class TopkGate(NamedTuple):
    """Result of `topk_gate`."""

    ids_TK: Tensor
    """[T, K] int64 chosen experts, best first."""
    weights_TK: Tensor
    """[T, K] float32 weights (float64 for float64 logits), differentiable in the logits."""
    counts_E: Tensor
    """[E] int64 pairs of each expert."""


def choice_scores(logits_TE: Tensor, score: str, bias_E: Tensor | None, num_groups: int, top_groups: int) -> Tensor:
    """Compute c: what the K largest are taken of.

    Args:
        logits_TE: [T, E] float32 or float64 logits.
        score: "softmax" or "sigmoid".
        bias_E: [E] added for the choice only, or None.
        num_groups: number of equal, consecutive groups of experts.
        top_groups: groups that may be chosen from.

    Returns:
        [T, E]; -inf outside of the chosen groups.
    """
    if bias_E is None and num_groups == 1:
        return logits_TE
    c_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    if bias_E is not None:
        c_TE = c_TE + bias_E
    if num_groups == 1:
        return c_TE
    grouped = c_TE.unflatten(-1, (num_groups, -1))
    worth = grouped.sort(dim=-1, descending=True).values[..., :2].sum(-1)
    chosen = worth.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, chosen, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)


def topk_gate_reference(
    logits_TE: Tensor,
    k: int,
    *,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> TopkGate:
    """Gate by the module's equations; autograd gives the gradient.

    Args:
        logits_TE: [T, E] router logits.
        k: K.
        score: "softmax" or "sigmoid".
        bias_E: [E] added for the choice only, or None.
        num_groups: number of equal, consecutive groups of experts.
        top_groups: groups that may be chosen from.
        renormalize: divide the weights by their sum.
        scale: factor on the weights.

    Returns:
        Ids, weights and counts.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    c_TE = choice_scores(logits_TE.detach(), score, bias_E, num_groups, top_groups)
    ids_TK = c_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + EPSILON)
    counts_E = torch.zeros(logits_TE.shape[1], dtype=torch.int64, device=logits_TE.device)
    counts_E.scatter_add_(0, ids_TK.reshape(-1), torch.ones_like(ids_TK).reshape(-1))
    return TopkGate(ids_TK, weights_TK * scale, counts_E)
