r"""Policy-gradient losses for routers that sample their experts, on one micro-batch.

For each sequence b the model runs under M independent selections; L_mb is that sequence's label cross-entropy summed
over its tokens and divided by the number of label tokens of the optimizer step, so router and adapters descend one
objective. The surrogate is

    sum_b 1/(M-1) sum_m (L_mb - mean_m L_mb) log Q_mb,          credit = "sequence"

with that sequence's own log Q. With `credit="to_go"` a decision at token t is charged only with the losses of labels
at or after t, which it can influence; earlier labels cannot depend on it, so dropping them keeps the estimator
unbiased and takes out their noise. It needs one decision a token in a causal model. `variance.py` estimates the
variance under both.

The gradient of a router needs only losses and log-probabilities, so M - 1 of the M passes run without a graph for
the model, and layers below the first adapter run once for all (see `prefix.py`).

Source: ReMix, arXiv 2603.10160, section 3.1. The paper gives neither the granularity of a decision nor the share of
a sequence; both follow from the loss here.

Shapes: B rows, S sequence, M samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kit.errors import ConfigError
from moe_kit.routing.decision import Routing
from moe_kit.routing.policy import rloo_loss
from moe_kit.routing.state import ModelRouting
from moe_kit.training.variance import DecisionScores, decision_scores

CREDITS = ("sequence", "to_go")
_IGNORED_LABEL = -100


def token_losses(logits: Tensor, labels: Tensor, shifted: bool = True) -> Tensor:
    """Cross-entropy of each position, or of each sequence where a sequence has one class.

    Args:
        logits: float [B, S, V], or [B, V] for classes of sequences.
        labels: int64 [B, S] or [B], -100 where there is nothing to predict.
        shifted: position s predicts label s + 1 (causal language models).

    Returns:
        float32 [B, S], or [B, 1] for classes of sequences; position s holds the loss that the output at s is charged with,
        0 where there is no label.
    """
    if logits.dim() == 2:
        labels = labels.reshape(-1)
        return F.cross_entropy(logits.float(), labels, ignore_index=_IGNORED_LABEL, reduction="none")[:, None]
    if shifted:
        labels = F.pad(labels[:, 1:], (0, 1), value=_IGNORED_LABEL)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORED_LABEL, reduction="none"
    )
    return losses.view(labels.shape)


def at_their_columns(losses_BS: Tensor, kept: Tensor | int | None, length: int) -> Tensor:
    """Put the losses of a head that ran on some columns only back to where they stand in the input.

    Args:
        losses_BS: float32 [B, kept columns].
        kept: the model's argument `logits_to_keep`, indices of columns or the number of last ones; None = last ones.
        length: S.

    Returns:
        float32 [B, S], 0 where the head did not run.
    """
    if losses_BS.shape[1] >= length:
        return losses_BS
    if isinstance(kept, Tensor):
        return losses_BS.new_zeros(losses_BS.shape[0], length).index_copy(1, kept, losses_BS)
    return F.pad(losses_BS, (length - losses_BS.shape[1], 0))


@dataclass(frozen=True)
class PolicySample:
    """One pass under one selection.

    Attributes:
        losses_BS: float32 [B, S], loss of each position.
        log_prob: float32 [B] (credit "sequence") or [B, S] (credit "to_go"), summed over routers, with gradient.
        scores: of every decision, for the estimate of the variance; empty = none asked for.
    """

    losses_BS: Tensor
    log_prob: Tensor
    scores: tuple[DecisionScores, ...] = ()


def has_policy(model: nn.Module) -> bool:
    """Whether a model holds a sampled router that is being trained."""
    for module in model.modules():
        if getattr(module, "is_policy", False) and any(p.requires_grad for p in module.parameters()):
            return True
    return False


def sample_of(state: ModelRouting, losses_BS: Tensor, credit: str) -> PolicySample:
    """Collect the decisions of the pass that has just ended.

    Args:
        state: routing state of the model.
        losses_BS: float32 [B, S], losses of that pass.
        credit: "sequence" or "to_go".

    Returns:
        The sample; every decision is counted once, however many linears or tokens obey it.

    Raises:
        ConfigError: if nothing was sampled, or `credit="to_go"` meets a decision that is not one a token.
    """
    routings = [routing for _, routing, _ in state.context.registered if routing.log_prob_N is not None]
    if not routings:
        raise ConfigError("no router sampled its experts in this pass: use a preset such as 'remix', in training mode.")
    # a forward-only pass runs without a graph, its log-probabilities still carry theirs
    with torch.enable_grad():
        log_prob = _log_prob(routings, losses_BS.shape, credit)
    scores = decision_scores(state.context.registered, losses_BS.numel())
    return PolicySample(losses_BS, log_prob, tuple(scores))


def _log_prob(routings: list[Routing], shape: torch.Size, credit: str) -> Tensor:
    if credit == "sequence":
        return torch.stack([routing.log_prob_B() for routing in routings]).sum(0)
    batch, length = shape
    terms = []
    for routing in routings:
        if routing.decision_T is not None or routing.num_decisions != batch * length:
            raise ConfigError("credit='to_go' needs one decision a token; use credit='sequence' with this scope.")
        log_prob_N = routing.log_prob_N
        terms.append(log_prob_N if routing.mask_N is None else log_prob_N * routing.mask_N)
    return torch.stack(terms).sum(0).view(batch, length)


def policy_loss(samples: list[PolicySample], items: Tensor | float, credit: str) -> Tensor:
    """Surrogate of a micro-batch; its gradient is the leave-one-out policy gradient.

    Args:
        samples: M passes, at least 2.
        items: label tokens of the optimizer step; a sequence's share of the batch loss is its token sum over this.
        credit: "sequence" or "to_go".

    Returns:
        Scalar float32.
    """
    losses_MBS = torch.stack([sample.losses_BS for sample in samples]) / items
    log_probs = torch.stack([sample.log_prob for sample in samples])
    if credit == "sequence":
        return rloo_loss(losses_MBS.sum(-1), log_probs)
    # reverse cumulative sum: what is charged to a decision is all that comes at or after it
    to_go_MBS = losses_MBS.flip(-1).cumsum(-1).flip(-1)
    return rloo_loss(to_go_MBS, log_probs)


def label_items(inputs: Mapping[str, Any], num_items: Tensor | int | None, shifted: bool) -> Tensor | float:
    """Label tokens that the loss is divided by: the trainer's number, else those of this micro-batch."""
    if num_items is not None:
        return num_items
    labels = inputs["labels"][:, 1:] if shifted else inputs["labels"]
    return (labels != _IGNORED_LABEL).sum().clamp_min(1)
