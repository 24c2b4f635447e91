r"""`routing_metrics`: a few numbers on the last forward pass, and an alarm when a layer collapses.

For a site with decisions n (real ones only), experts e, probabilities p = softmax(logits), weights w:

    load share        c_e = decisions that chose e / all choices
    token entropy     mean_n H(p_n) / ln E           1 = undecided, 0 = certain
    mean entropy      H(mean_n p_n) / ln E           1 = all experts used alike
    effective experts mean_n (sum_e |w|)^2 / sum_e w^2      (ESS: 1 for one expert, k for k equal ones)
    max violation     (max load - mean load) / mean load
    overlap           |A and B| / |A or B| of the chosen sets of neighbouring sites, mean over tokens

A site has collapsed when its decisions all choose (nearly) the same experts: the effective number of loaded experts
exp(H(c)) is no more than 1.05 times the experts a decision has on average, with experts left over.

Nothing here runs in the forward pass; the one wait for the device is at the end of the call.

Sources: ESS as in ReMix, arXiv 2603.10160, section 2.2; max violation, arXiv 2408.15664.
"""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from moe_kit.routing.decision import Routing
from moe_kit.routing.state import ModelRouting, require_routing_state

logger = logging.getLogger(__name__)

_MIN_DECISIONS = 32
_COLLAPSE_MARGIN = 1.05


@torch.no_grad()
def routing_metrics(model: nn.Module) -> dict[str, float]:
    """Routing statistics of the last forward pass.

    Args:
        model: a model with moe_kit routers.

    Returns:
        At most twelve plain floats, whatever the number of layers: means over sites, and the worst site where that
        matters. Empty before the first pass. Sites that collapsed are named once, in one line of the log
        (`moe_kit` logger).

    Raises:
        RoutingError: if the model has no moe_kit routers.
    """
    state = require_routing_state(model)
    # layer routers show their actions here too, which are no experts: to execute everything is no collapse
    routings = [(site, routing) for site, routing, router in state.context.registered if router.has_experts]
    if not routings:
        return {}
    device = routings[0][1].weights_NK.device
    # overlaps stand behind the statistics, so that one copy to the host carries all
    overlaps = [_overlap(first, second) for (_, first), (_, second) in pairwise(routings) if _alike(first, second)]
    statistics = [_site_statistics(routing) for _, routing in routings]
    host = torch.cat([value.reshape(-1).to(device) for value in statistics + overlaps]).cpu()
    per_site = host[: len(statistics) * len(_NAMES)].view(-1, len(_NAMES))
    # columns follow _site_statistics
    columns = dict(zip(_NAMES, per_site.unbind(1)))
    _alarm(state, [site for site, _ in routings], columns)
    metrics = {
        "load_share_max": columns["share_max"].mean(),
        "load_share_max_worst": columns["share_max"].max(),
        "load_share_min": columns["share_min"].mean(),
        "token_entropy": columns["token_entropy"].mean(),
        "mean_entropy": columns["mean_entropy"].mean(),
        "effective_experts": columns["effective"].mean(),
        "experts_per_decision": columns["chosen"].mean(),
        "max_violation": columns["violation"].mean(),
        "max_violation_worst": columns["violation"].max(),
        "dead_experts": columns["dead"].sum(),
        "collapsed_sites": columns["collapsed"].sum(),
    }
    if overlaps:
        metrics["overlap"] = host[per_site.numel() :].mean()
    return {name: float(value) for name, value in metrics.items()}


# sites that a warning names; all of them would be a line for each linear of a large model
_NAMED = 3

_NAMES = (
    "share_max",
    "share_min",
    "token_entropy",
    "mean_entropy",
    "effective",
    "chosen",
    "violation",
    "dead",
    "collapsed",
)


def _site_statistics(routing: Routing) -> Tensor:
    """The numbers of `_NAMES`, float64 [9], on the routing's device."""
    experts = routing.num_experts
    weights_NE = routing.dense_NE().double()
    real_N = torch.ones_like(weights_NE[:, 0]) if routing.mask_N is None else routing.mask_N.double()
    count = real_N.sum().clamp_min(1)

    def mean(value_N: Tensor) -> Tensor:
        return torch.where(real_N > 0, value_N, 0.0).sum() / count

    load_E = routing.load_E().double()
    share_E = load_E / load_E.sum().clamp_min(1)
    scale = math.log(max(experts, 2))
    if routing.logits_NE is None:
        token_entropy = mean_entropy = torch.full_like(count, float("nan"))
    else:
        log_p = routing.logits_NE.double().log_softmax(-1)
        token_entropy = mean(-(log_p.exp() * log_p).sum(-1)) / scale
        mean_p = torch.where(real_N[:, None] > 0, log_p.exp(), 0.0).sum(0) / count
        mean_entropy = -torch.xlogy(mean_p, mean_p).sum() / scale
    effective = mean(weights_NE.abs().sum(-1).square() / weights_NE.square().sum(-1).clamp_min(1e-30))
    chosen = load_E.sum() / count
    loaded = torch.exp(-torch.xlogy(share_E, share_E).sum())
    collapsed = (loaded <= _COLLAPSE_MARGIN * chosen) & (chosen < 0.9 * experts) & (real_N.sum() >= _MIN_DECISIONS)
    mean_load = load_E.mean().clamp_min(1e-12)
    return torch.stack(
        [
            share_E.max(),
            share_E.min(),
            token_entropy,
            mean_entropy,
            effective,
            chosen,
            (load_E.max() - load_E.mean()) / mean_load,
            (load_E == 0).sum().double(),
            collapsed.double(),
        ]
    )


def _alike(first: Routing, second: Routing) -> bool:
    return first.num_experts == second.num_experts and first.num_decisions == second.num_decisions


def _overlap(first: Routing, second: Routing) -> Tensor:
    """Mean Jaccard index of the chosen sets of real decisions; two empty sets count as 0."""
    one, two = first.chosen_NE(), second.chosen_NE()
    jaccard_N = (one & two).sum(-1).double() / (one | two).sum(-1).clamp_min(1)
    real_N = torch.ones_like(jaccard_N) if first.mask_N is None else first.mask_N.double()
    return (jaccard_N * real_N).sum() / real_N.sum().clamp_min(1)


def _alarm(state: ModelRouting, sites: list[str], columns: dict[str, Tensor]) -> None:
    """Warn once of each site that collapsed; all that are new stand in one line."""
    fresh = [i for i, site in enumerate(sites) if columns["collapsed"][i] and site not in state.collapse_warned]
    if not fresh:
        return
    state.collapse_warned.update(sites[i] for i in fresh)
    more = f" and {len(fresh) - _NAMED} more" if len(fresh) > _NAMED else ""
    logger.warning(
        "routing collapsed at %s%s: all decisions there use nearly the same experts (%.2f a decision, largest load "
        "share %.2f). Raise the balance loss, lower the router's learning rate, or use preset 'loss_free'.",
        ", ".join(sorted(sites[i] for i in fresh)[:_NAMED]),
        more,
        columns["chosen"][fresh].mean(),
        columns["share_max"][fresh].max(),
    )
