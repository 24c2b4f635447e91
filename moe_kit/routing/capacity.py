r"""Token choice with a capacity: what does not fit into an expert is dropped and goes through the base alone.

    C_b = ceil(factor * k * S_b / E)     places of an expert for sequence b of real length S_b

Switch fills places by order of arrival. GShard places all first choices before any second choice, and tries a second
choice only with probability min(1, 2 g_2) in training (always in evaluation), g the gates normalised over the two.

GShard looks ahead: whether a second choice finds room depends on first choices of later tokens, so it is refused on causal
models unless asked for. Switch reads no later token, but C_b knows how many there are: a longer sequence has more room.

Places are counted for each sequence, so that a row does not depend on its batch mates; `group="batch"` counts over
the whole batch, as the papers do.

Sources: Switch, arXiv 2101.03961; GShard, arXiv 2006.16668.

Shapes: N decisions (tokens), E experts, K choices, B sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moe_kit.errors import ConfigError
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.scope import Decisions, pool_sum
from moe_kit.routing.select import Selection, stable_top_k


def running_count(marks_NE: Tensor, sequence_N: Tensor, count: int) -> Tensor:
    """How many marks an expert got before each token of the same sequence, in order of arrival.

    Args:
        marks_NE: int64 [N, E], 0 or 1.
        sequence_N: int64 [N].
        count: number of sequences.

    Returns:
        int64 [N, E].
    """
    order = sequence_N.sort(stable=True).indices
    ordered = marks_NE[order]
    before = ordered.cumsum(0) - ordered
    lengths = torch.zeros(count, dtype=torch.long, device=order.device)
    lengths = lengths.index_add(0, sequence_N, torch.ones_like(sequence_N))
    start = (lengths.cumsum(0) - lengths).clamp_max(max(len(order) - 1, 0))
    before = before - before[start][sequence_N[order]]
    return torch.empty_like(before).index_copy_(0, order, before)


class SelectCapacity(nn.Module):
    """Top-k with a limited number of places in each expert.

    Args:
        k: choices of a token.
        factor: capacity factor in training.
        eval_factor: capacity factor in evaluation; None = the same.
        policy: "switch" fills by arrival (a token's choices in their order), "gshard" all first choices first.
        group: count places for each "sequence" or over the "batch".

    Raises:
        ConfigError: on an unknown policy or group, a factor of 0 or less, or "gshard" with k other than 2.
    """

    # equal logits for all tokens do not make its choice constant
    reads_tokens = True

    def __init__(
        self,
        k: int,
        *,
        factor: float = 1.25,
        eval_factor: float | None = None,
        policy: Literal["switch", "gshard"] = "switch",
        group: Literal["sequence", "batch"] = "sequence",
    ) -> None:
        super().__init__()
        if policy not in ("switch", "gshard") or group not in ("sequence", "batch"):
            raise ConfigError(f"policy {policy!r} with group {group!r}: expected switch or gshard, sequence or batch.")
        if policy == "gshard" and k != 2:
            raise ConfigError(f"policy 'gshard' is about first and second choices: top_k is {k}, expected 2.")
        if factor <= 0 or (eval_factor is not None and eval_factor <= 0):
            raise ConfigError(f"the capacity factor is {factor} (evaluation {eval_factor}), expected more than 0.")
        self.k, self.factor, self.policy, self.group = k, factor, policy, group
        self.eval_factor = factor if eval_factor is None else eval_factor

    def forward(self, scores_NE: Tensor, decisions: Decisions, context: RoutingContext) -> Selection:
        """Sparse selection; dropped choices are empty slots."""
        tokens, experts = scores_NE.shape
        ids_NK = stable_top_k(scores_NE, self.k)
        real_N = decisions.mask_N
        if real_N is None:
            real_N = torch.ones(tokens, dtype=torch.bool, device=ids_NK.device)
        one_sequence = self.group == "batch" or decisions.sequence_N is None
        sequence_N = torch.zeros_like(ids_NK[:, 0]) if one_sequence else decisions.sequence_N
        count = 1 if one_sequence else decisions.num_sequences
        assert count is not None
        lengths_B = pool_sum(real_N[:, None].double(), sequence_N, count)[:, 0]
        factor = self.factor if self.training else self.eval_factor
        places_N1 = (factor * self.k * lengths_B / experts).ceil()[sequence_N][:, None]
        tried_NK = real_N[:, None].expand_as(ids_NK)
        if self.policy == "gshard" and self.training:
            gates = scores_NE.gather(-1, ids_NK).softmax(-1)[:, 1]
            second = torch.rand_like(gates) < 2 * gates.detach()
            tried_NK = tried_NK & torch.stack([torch.ones_like(second), second], 1)
        marks_NKE = torch.zeros(tokens, self.k, experts, dtype=torch.long, device=ids_NK.device)
        marks_NKE.scatter_(2, ids_NK[..., None], tried_NK.long()[..., None])
        if self.policy == "switch":
            # choices of one token never share an expert, so a token's own choices do not count among themselves
            place_NE = running_count(marks_NKE.sum(1), sequence_N, count)
            place_NK = place_NE.gather(1, ids_NK)
        else:
            firsts_BE = torch.zeros(count, experts, dtype=torch.long, device=ids_NK.device)
            firsts_BE = firsts_BE.index_add(0, sequence_N, marks_NKE[:, 0])
            first = running_count(marks_NKE[:, 0], sequence_N, count)
            second = running_count(marks_NKE[:, 1], sequence_N, count) + firsts_BE[sequence_N]
            place_NK = torch.stack([first, second], 1).gather(2, ids_NK[..., None])[..., 0]
        kept = tried_NK & (place_NK < places_N1)
        return Selection(ids_NK=torch.where(kept, ids_NK, -1), considered_NK=ids_NK)

    def replayed(self, ids_NK: Tensor, scores_NE: Tensor, decisions: Decisions) -> Selection:
        """Given experts; weights are still normalised over what the scores would choose, dropped or not."""
        return Selection(ids_NK=ids_NK, considered_NK=stable_top_k(scores_NE, self.k))
