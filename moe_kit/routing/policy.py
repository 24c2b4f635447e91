r"""Policy gradient for routers that sample experts without replacement.

An ordered selection I = (i_1 .. i_k) has the Plackett-Luce law

    log Q(I) = sum_j [ z_{i_j} - logsumexp_{e not in i_1..i_{j-1}} z_e ],

and the leave-one-out estimator over M independent selections of the same input,

    G = 1/(M-1) sum_m (L_m - mean L) grad log Q(I_m),

is unbiased for grad E[L]. Replacing log Q by sum_j log softmax(z)_{i_j} (no denominators) is biased; the tests hold
that control. The remaining mass is computed by logsumexp over the remaining logits, never as 1 - cumsum, which is
-inf or NaN for a router that is nearly one-hot.

Sources: ReMix, arXiv 2603.10160, section 2.3; leave-one-out: Kool et al. 2019, "Buy 4 REINFORCE samples".

Shapes: E experts, K chosen experts, M Monte Carlo samples.
"""

from itertools import permutations

import torch
from torch import Tensor

from moe_kit.errors import RoutingError

_MAX_UNORDERED = 4


def plackett_luce_log_prob(logits: Tensor, ordered_ids: Tensor) -> Tensor:
    """Log-probability of drawing `ordered_ids` in this order without replacement.

    Args:
        logits: float [..., E], unnormalised scores.
        ordered_ids: int64 [..., K], distinct experts in the order of drawing, K <= E; -1 marks an empty slot, which
            contributes nothing.

    Returns:
        [...], in the logits' dtype, at least float32.

    Raises:
        RoutingError: if K > E.

    Example:
        >>> import torch
        >>> q = torch.tensor([0.5, 0.3, 0.2]).log()
        >>> round(plackett_luce_log_prob(q, torch.tensor([0, 1])).exp().item(), 4)  # 0.5 * 0.3 / 0.5
        0.3
    """
    num_experts, num_chosen = logits.shape[-1], ordered_ids.shape[-1]
    if num_chosen > num_experts:
        raise RoutingError(f"cannot draw {num_chosen} distinct experts out of {num_experts}: lower top_k.")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # each of these runs for every router and sample: few calls, and the fused ones
    empty = ordered_ids < 0
    ids = ordered_ids.clamp_min(0)
    remaining, terms = logits, []
    for slot in range(num_chosen):
        chosen = ids[..., slot : slot + 1]
        terms.append(remaining.log_softmax(-1).gather(-1, chosen))
        if slot + 1 < num_chosen:
            # an empty slot takes nothing away: what it points at stays
            taken = remaining.gather(-1, chosen).masked_fill(~empty[..., slot : slot + 1], float("-inf"))
            remaining = remaining.scatter(-1, chosen, taken)
    if not terms:
        return torch.zeros_like(logits[..., 0])
    return torch.cat(terms, -1).masked_fill(empty, 0.0).sum(-1)


def plackett_luce_set_log_prob(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of drawing the set `ids` in any order.

    Unbiased like the ordered form and of lower variance; it sums K! orders.

    Args:
        logits: float [..., E].
        ids: int64 [..., K], distinct experts, K <= 4.

    Returns:
        [...], in the logits' dtype, at least float32.

    Raises:
        RoutingError: if K > 4.
    """
    num_chosen = ids.shape[-1]
    if num_chosen > _MAX_UNORDERED:
        raise RoutingError(
            f"the unordered log-probability sums K! orders; got K = {num_chosen}, expected at most {_MAX_UNORDERED}: "
            "use the ordered form."
        )
    orders = [plackett_luce_log_prob(logits, ids[..., list(order)]) for order in permutations(range(num_chosen))]
    return torch.stack(orders).logsumexp(0)


def rloo_loss(losses: Tensor, log_probs: Tensor) -> Tensor:
    """Leave-one-out surrogate whose gradient is the policy gradient of the expected loss.

    Args:
        losses: float [M, ...], the loss of each sample, detached inside; callers give each sequence its share of the
            batch loss (its token sum over the number of label tokens in the batch).
        log_probs: float [M, ...], log-probability of the sampled decisions, carries the gradient.

    Returns:
        Scalar: sum over all dimensions after M of 1/(M-1) sum_m (L_m - mean L) log Q_m, in the inputs' dtype, at
        least float32.

    Raises:
        ValueError: if M = 1 (the leave-one-out mean of nothing) or the shapes differ.

    Example:
        >>> import torch
        >>> log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> rloo_loss(torch.tensor([3.0, 1.0]), log_probs).backward()
        >>> log_probs.grad
        tensor([ 1., -1.])
    """
    if losses.shape != log_probs.shape:
        raise RoutingError(
            f"losses have shape {tuple(losses.shape)}, log_probs {tuple(log_probs.shape)}: they must match."
        )
    samples = losses.shape[0] if losses.dim() else 0
    if samples < 2:
        raise RoutingError(f"leave-one-out needs at least 2 samples, got {samples}: set num_samples to 2 or more.")
    dtype = torch.float64 if torch.float64 in (losses.dtype, log_probs.dtype) else torch.float32
    losses = losses.detach().to(dtype)
    advantages = (losses - losses.mean(0, keepdim=True)) / (samples - 1)
    return (advantages * log_probs.to(dtype)).sum()
