r"""How noisy a policy gradient is, under each way of charging a decision, from samples that are there anyway.

Decision n of a router has the logits z_n. With the score s_mn = d log Q(I_mn) / d z_n of sample m and the losses R_mn
that a credit charges the decision with, the leave-one-out estimator of d E[loss] / d z_n is

    G_n = 1/(M-1) sum_m (R_mn - mean_m R_mn) s_mn.

The figure is the trace of the covariance of G over all decisions and routers of a micro-batch, that is the variance of
the gradient with respect to the logits, given the batch:

    V = sum_n |G_n|^2 - sum_n <G'_n, G''_n>,

G' and G'' being the estimator of the first and of the second half of the samples. They are independent with the mean
of G, so V is unbiased (and may come out slightly below zero where there is little noise). It takes 4 samples. With 2
or 3 the second sum is left out: the figure is then the variance plus the squared mean, and since the mean is the same
under every unbiased credit, the difference of two credits is still that of their variances.

Not here: the variance between batches, and that of the experts' gradients.

Shapes: B rows, S sequence, M samples, G routers, N decisions, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kit.routing.decision import Routing

_SAMPLES_FOR_THE_MEAN = 4


@dataclass(frozen=True)
class DecisionScores:
    """Scores of sampled decisions of one pass, routers of equal shape together.

    Attributes:
        score_GNE: float32 [G, N, E], derivative of each log-probability with respect to its logits, 0 for padding.
        sequence_N: int64 [N], the sequence that a decision belongs to; None = the decision's own index.
        one_a_token: N = B * S, in the order of the tokens.
    """

    score_GNE: Tensor
    sequence_N: Tensor | None
    one_a_token: bool


def decision_scores(registered: Sequence[tuple[str, Routing, Any]], tokens: int) -> list[DecisionScores]:
    """Scores of the decisions of a pass.

    Args:
        registered: (site, routing, router) of the pass; those that were not sampled, or whose router is not trained,
            are left out.
        tokens: B * S.

    Returns:
        One entry for each shape and law of the routers.
    """
    groups: dict[tuple, list[tuple[Routing, Any]]] = defaultdict(list)
    for _, routing, router in registered:
        if routing.log_prob_N is None or not routing.log_prob_N.requires_grad or routing.logits_NE is None:
            continue
        # a router with a bias of its own has its own law
        law = id(router) if router.stepper is not None else getattr(router.select, "unordered", None)
        groups[(law, routing.logits_NE.shape, routing.expert_ids_NK.shape[1], routing.decision_T is None)].append(
            (routing, router)
        )
    return [_scores_of(group, tokens) for group in groups.values()]


def _scores_of(group: list[tuple[Routing, Any]], tokens: int) -> DecisionScores:
    first, router = group[0]
    logits_GNE = torch.stack([routing.logits_NE.detach() for routing, _ in group]).requires_grad_()
    ids_GNK = torch.stack([routing.expert_ids_NK for routing, _ in group])
    with torch.enable_grad():
        biased = logits_GNE if router.stepper is None else router.stepper.choice_scores(logits_GNE)
        (score_GNE,) = torch.autograd.grad(router.select.log_prob(biased, ids_GNK).sum(), logits_GNE)
    if any(routing.mask_N is not None for routing, _ in group):
        # an encoder and a decoder of equal length have masks of their own
        real_GN = torch.stack([_real(routing) for routing, _ in group])
        # where, not a product: padding may carry NaN
        score_GNE = torch.where(real_GN[..., None], score_GNE, 0.0)
    one_a_token = first.decision_T is None and first.num_decisions == tokens
    return DecisionScores(score_GNE, first.sequence_N, one_a_token)


def _real(routing: Routing) -> Tensor:
    if routing.mask_N is not None:
        return routing.mask_N
    return torch.ones_like(routing.logits_NE[:, 0], dtype=torch.bool)


def credit_variance(samples: Sequence[Any], items: Tensor | float, credit: str) -> Tensor | None:
    """Estimate the variance of the gradient of a micro-batch with respect to the routers' logits under one credit.

    Args:
        samples: M passes (`rloo.PolicySample`), at least 2; any credit, whatever it was that they trained with.
        items: label tokens of the optimizer step, as for `rloo.policy_loss`.
        credit: "sequence" or "to_go".

    Returns:
        Scalar float32 (see the module for its formula); None if nothing was sampled, or if the credit charges tokens
        and some decision is not one a token.
    """
    losses_MBS = torch.stack([sample.losses_BS for sample in samples]).float() / items
    if not samples[0].scores or (credit == "to_go" and not all(part.one_a_token for part in samples[0].scores)):
        return None
    charge_MBS = losses_MBS.flip(-1).cumsum(-1).flip(-1)
    total = losses_MBS.new_zeros(())
    for parts in zip(*(sample.scores for sample in samples), strict=True):
        score_MGNE = torch.stack([part.score_GNE for part in parts])
        if credit == "to_go":
            charge_MN = charge_MBS.flatten(1)
        elif parts[0].sequence_N is None:
            charge_MN = charge_MBS[..., 0]
        else:
            charge_MN = charge_MBS[..., 0][:, parts[0].sequence_N]
        total = total + estimator_variance(score_MGNE, charge_MN)
    return total


def estimator_variance(score_MGNE: Tensor, charge_MN: Tensor) -> Tensor:
    """V of the module's formula.

    Args:
        score_MGNE: float [M, G, N, E].
        charge_MN: float [M, N], what each decision is charged with.

    Returns:
        Scalar: the variance for M >= 4, the second moment for M = 2 and 3.
    """
    samples = charge_MN.shape[0]
    second = _estimate(score_MGNE, charge_MN).square().sum()
    if samples < _SAMPLES_FOR_THE_MEAN:
        return second
    half = samples // 2
    one = _estimate(score_MGNE[:half], charge_MN[:half])
    two = _estimate(score_MGNE[half:], charge_MN[half:])
    return second - (one * two).sum()


def _estimate(score_MGNE: Tensor, charge_MN: Tensor) -> Tensor:
    """G of each decision, [G, N, E]."""
    advantage_MN = (charge_MN - charge_MN.mean(0)) / (charge_MN.shape[0] - 1)
    return torch.einsum("mgne,mn->gne", score_MGNE, advantage_MN)
