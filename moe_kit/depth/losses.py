r"""Losses of layer routing: over the decisions of one forward pass, padding excluded.

    rate        sum_l rho_l, mean over rows                      FiRST: penalty on executed layers
    weight      sum_l ||w_l||^2 of the routers' last maps        FiRST: keeps the routers small
    target      |(1 - s) - mean of executed share|               Informed Routing: reach a rate s of saved work
    similarity  mean over layers of sum over units of approximated (1 - cos(x, x + F)), x the unit's input
                                                     Informed Routing: forecast where little changes
    square      mean_t (sum_l g_l)^2                             FlexiDepth: spread the saving over tokens
    capacity    BCE of the causal predictor against top-k        Mixture-of-Depths

and the focal loss of supervised routers (Dr.LLM, section 3.2, appendix D)

    L = -(1/L) sum_l alpha_{y_l} (1 - p_{y_l})^gamma log p_{y_l},   alpha_c ~ (1 - beta) / (1 - beta^{n_c}), mean 1.

Shapes: B rows, T tokens, N decisions, U units, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_kit.depth.config import LayerRoutingConfig


@dataclass
class Trace:
    """What one unit decided in a training pass.

    Attributes:
        column: the unit's place in execution order.
        logits_NA: float32 [N, A].
        gate_N: float32 [N], weight of executing: soft, straight-through or 0/1; has a gradient where the method has.
        mask_N: bool [N], False for padding; None = all real.
        router: the unit's router.
        dissimilarity_N: float32 [N], 1 - cos(x, x + F(x)), if it was measured.
        target_N: bool [N], tokens that the top-k choice took (capacity routing).
        predicted_NA: float32 [N, 2], the causal predictor's logits (capacity routing).
        log_prob_N: float32 [N], log-probability of a sampled action.
        execute: index of execute in the logits.
        layer: index of the decoder layer that the unit is, or is part of.
    """

    column: int
    logits_NA: Tensor
    gate_N: Tensor
    mask_N: Tensor | None
    router: nn.Module
    dissimilarity_N: Tensor | None = None
    target_N: Tensor | None = None
    predicted_NA: Tensor | None = None
    log_prob_N: Tensor | None = None
    execute: int = 1
    layer: int = 0


def _mean(value_N: Tensor, mask_N: Tensor | None) -> Tensor:
    if mask_N is None:
        return value_N.mean()
    return (value_N * mask_N).sum() / mask_N.sum().clamp_min(1)


def rate(traces: Sequence[Trace], target: float) -> Tensor:
    """Sum over units of the mean weight of executing."""
    return torch.stack([_mean(trace.gate_N, trace.mask_N) for trace in traces]).sum()


def weight(traces: Sequence[Trace], target: float) -> Tensor:
    """Sum over units of the squared weights of the router's last map."""
    return torch.stack([trace.router.scorer.last.weight.square().sum() for trace in traces]).sum()


def target_rate(traces: Sequence[Trace], target: float) -> Tensor:
    """Distance of the executed share from 1 - target, where target is the share to save."""
    share = torch.stack([_mean(trace.gate_N, trace.mask_N) for trace in traces]).mean()
    return ((1 - target) - share).abs()


def square(traces: Sequence[Trace], target: float) -> Tensor:
    """Mean over tokens of the squared number of executed units."""
    total_N = torch.stack([trace.gate_N for trace in traces]).sum(0)
    return _mean(total_N.square(), traces[0].mask_N)


def similarity(traces: Sequence[Trace], target: float) -> Tensor:
    """Mean over layers of the sum over their units of the mean dissimilarity of the tokens that are approximated."""
    terms, layers = [], set()
    for trace in traces:
        if trace.dissimilarity_N is not None:
            skipped_N = 1 - trace.gate_N
            mask_N = torch.ones_like(skipped_N) if trace.mask_N is None else trace.mask_N.float()
            total = (skipped_N * trace.dissimilarity_N * mask_N).sum()
            terms.append(total / (skipped_N.detach() * mask_N).sum().clamp_min(1))
            layers.add(trace.layer)
    return torch.stack(terms).sum() / len(layers) if terms else traces[0].gate_N.new_zeros(())


def capacity(traces: Sequence[Trace], target: float) -> Tensor:
    """Mean over units of the binary cross-entropy of the causal predictor against the top-k choice."""
    terms = []
    for trace in traces:
        if trace.predicted_NA is not None and trace.target_N is not None:
            logit_N = trace.predicted_NA[:, trace.execute] - trace.predicted_NA[:, 1 - trace.execute]
            loss_N = functional.binary_cross_entropy_with_logits(logit_N, trace.target_N.float(), reduction="none")
            terms.append(_mean(loss_N, trace.mask_N))
    return torch.stack(terms).mean() if terms else traces[0].gate_N.new_zeros(())


LOSSES = {
    "rate": rate,
    "weight": weight,
    "target": target_rate,
    "similarity": similarity,
    "square": square,
    "capacity": capacity,
}


def learns_from_model_loss(config: LayerRoutingConfig) -> bool:
    """Whether the model's loss, with the routing losses in it, has a gradient for the routers.

    Args:
        config: configuration of layer routers that are learned.
    """
    if any(config.losses.values()):
        return True
    if config.scope == "sequence":
        return config.train_mode == "soft"
    return config.train_mode == "gumbel" or config.branch_scale != "none"


def how_to_teach(config: LayerRoutingConfig) -> str:
    """What layer routers need that learn nothing from the model's loss.

    Args:
        config: their configuration.
    """
    if config.train_mode == "sample":
        return (
            "sample their routes and learn from rewards only: train them with moe_kit.depth.fit.fit_policy, then freeze "
            "them (requires_grad_(False)) to train something else"
        )
    return (
        "decide hard, so the loss of this training loop has no gradient for them: train them on searched routes "
        "(`moe-kit search-layers`, then moe_kit.depth.fit.fit_supervised) and freeze them (requires_grad_(False)) to "
        "train something else; or take a preset that learns from the model's loss ('first', 'informed', 'flexi', 'mod')"
    )


def class_weights(counts_A: Tensor, beta: float = 0.999) -> Tensor:
    """Weights of classes by their effective number, mean 1 over the classes that occur.

    Args:
        counts_A: float [A], labels of each class.
        beta: in [0, 1); 0 gives equal weights. With 1e5 labels 0.999 hardly re-balances, 0.99999 does.

    Returns:
        float32 [A]; 0 for classes without labels.

    Example:
        >>> import torch
        >>> [round(v, 3) for v in class_weights(torch.tensor([4399., 120956., 1457.])).tolist()]
        [0.916, 0.905, 1.179]
    """
    counts_A = counts_A.double()
    raw_A = torch.where(counts_A > 0, (1 - beta) / (1 - beta**counts_A).clamp_min(1e-12), 0.0)
    return (raw_A * (raw_A > 0).sum() / raw_A.sum().clamp_min(1e-12)).float()


def focal_loss(logits_NA: Tensor, labels_N: Tensor, alpha_A: Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Focal loss with class weights; gamma 0 and no weights is cross-entropy.

    Args:
        logits_NA: float32 [N, A].
        labels_N: int64 [N], index of the right action; -100 is ignored.
        alpha_A: float32 [A] from `class_weights`; None = 1.
        gamma: exponent, 0 or more.

    Returns:
        Scalar, mean over the labels.
    """
    known_N = labels_N >= 0
    index_N = labels_N.clamp_min(0)
    log_p_N = logits_NA.log_softmax(-1).gather(-1, index_N[:, None])[:, 0]
    loss_N = -((1 - log_p_N.exp()).clamp_min(0) ** gamma) * log_p_N
    if alpha_A is not None:
        loss_N = loss_N * alpha_A.to(loss_N.device)[index_N]
    return (loss_N * known_N).sum() / known_N.sum().clamp_min(1)
