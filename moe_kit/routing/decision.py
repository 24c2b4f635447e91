r"""`Routing`: a sparse matrix of decisions by experts.

    W_{n,e} = weight of expert e for decision n, zero where e was not chosen.

A decision is made for a token, a sequence or a request; `decision_T` maps tokens to decisions. It is stored either
sparsely (`expert_ids_NK`, `weights_NK`, -1 marks an empty slot) or densely (`selected_NE`, `weights_NE`), whichever
the selection produced; the other form is derived on demand and stays differentiable. Shapes depend on sizes only,
never on what was chosen, so recomputation, compilation and CUDA graphs see the same program.

Shapes: T tokens, N decisions, E experts, K slots a decision, P (token, expert) pairs, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from moe_kit_kernels.common.cached import cached
from torch import Tensor

from moe_kit.errors import RoutingError

if TYPE_CHECKING:
    from moe_kit_kernels.route_plan import RoutePlan


@dataclass(frozen=True, eq=False)
class Routing:
    """One routing decision for each of N decisions over E experts.

    Attributes:
        num_experts: E.
        sparse_ids_NK: int64 [N, K], -1 for an empty slot; None when the decision is dense.
        sparse_weights_NK: float32 [N, K], 0 in empty slots.
        selected_NE: bool [N, E], experts chosen by a dense decision.
        full_weights_NE: float32 [N, E], 0 where not selected.
        logits_NE: float32 [N, E] scores that the decision was made from (before any balance bias); None if forced.
        log_prob_N: float32 [N], log-probability of a sampled decision; None if it was not sampled.
        sequence_N: int64 [N], sequence of each decision; None = the decision's own index.
        num_sequences: number of sequences behind `sequence_N`.
        decision_T: int64 [T], decision of each token; None = one decision a token.
        mask_N: bool [N], False for decisions about padding; None = all real.
        base_weight_N: float32 [N], multiplies the frozen path; None = 1.
        chance_NE: float32 [N, E], probability of being chosen under the router's own noise; None without noise.
        computes_all: a bank computes every expert, though only `selected_NE` counts as chosen: weights of the others
            are 0 in value but carry a gradient to the router (DenseMixer). Dense decisions only.
    """

    num_experts: int
    sparse_ids_NK: Tensor | None = None
    sparse_weights_NK: Tensor | None = None
    selected_NE: Tensor | None = None
    full_weights_NE: Tensor | None = None
    logits_NE: Tensor | None = None
    log_prob_N: Tensor | None = None
    sequence_N: Tensor | None = None
    num_sequences: int | None = None
    decision_T: Tensor | None = None
    mask_N: Tensor | None = None
    base_weight_N: Tensor | None = None
    chance_NE: Tensor | None = None
    computes_all: bool = False

    def __post_init__(self) -> None:
        sparse = self.sparse_ids_NK is not None and self.sparse_weights_NK is not None
        dense = self.selected_NE is not None and self.full_weights_NE is not None
        if sparse == dense:
            raise RoutingError(
                "a Routing needs either ids and weights [N, K] or selected and weights [N, E], not both."
            )

    def without_graph(self) -> Routing:
        """The same decision, what was derived from it included, as leaves: recomputation reads it and keeps no graph alive."""
        copied = object.__new__(type(self))
        copied.__dict__.update({name: leaf_of(value) for name, value in self.__dict__.items()})
        return copied

    @classmethod
    def of_tokens(
        cls,
        num_experts: int,
        ids_TK: Tensor,
        weights_TK: Tensor,
        logits_TE: Tensor,
        sequence_T: Tensor,
        num_sequences: int,
        mask_T: Tensor | None,
    ) -> Routing:
        """A sparse decision for each token; what a frozen dataclass's own start takes is seen at one token.

        Args:
            num_experts: E.
            ids_TK: int64 [T, K].
            weights_TK: float32 [T, K].
            logits_TE: float32 [T, E].
            sequence_T: int64 [T], sequence of each token.
            num_sequences: number of sequences.
            mask_T: bool [T], False for padding; None = all real.
        """
        routing = object.__new__(cls)
        routing.__dict__.update(
            num_experts=num_experts,
            sparse_ids_NK=ids_TK,
            sparse_weights_NK=weights_TK,
            logits_NE=logits_TE,
            sequence_N=sequence_T,
            num_sequences=num_sequences,
            mask_N=mask_T,
        )
        return routing

    @property
    def is_dense(self) -> bool:
        """True if stored as [N, E]; then K equals E."""
        return self.selected_NE is not None

    @property
    def num_decisions(self) -> int:
        """N."""
        return self.weights_NK.shape[0]

    @cached
    def expert_ids_NK(self) -> Tensor:
        """int64 [N, K], -1 for an empty slot. A dense decision has K = E and its experts in order."""
        if self.sparse_ids_NK is not None:
            return self.sparse_ids_NK
        experts_E = torch.arange(self.num_experts, device=self.selected_NE.device)
        return torch.where(self.selected_NE, experts_E, -1)

    @property
    def weights_NK(self) -> Tensor:
        """float32 [N, K], 0 in empty slots."""
        stored = self.full_weights_NE if self.is_dense else self.sparse_weights_NK
        assert stored is not None
        return stored

    def dense_NE(self) -> Tensor:
        """Weights as a full matrix, differentiable.

        Returns:
            float32 [N, E].
        """
        if self.full_weights_NE is not None:
            return self.full_weights_NE
        ids_NK = self.expert_ids_NK
        slots_NK = torch.where(ids_NK < 0, self.num_experts, ids_NK)
        shape = (ids_NK.shape[0], self.num_experts + 1)
        full = self.sparse_weights_NK.new_zeros(shape).scatter_add(1, slots_NK, self.sparse_weights_NK)
        return full[:, : self.num_experts]

    def chosen_NE(self) -> Tensor:
        """bool [N, E], experts in use, without regard to their weights; padding decisions included."""
        if self.selected_NE is not None:
            return self.selected_NE
        ids_NK = self.expert_ids_NK
        slots_NK = torch.where(ids_NK < 0, self.num_experts, ids_NK)
        chosen = torch.zeros(ids_NK.shape[0], self.num_experts + 1, dtype=torch.bool, device=ids_NK.device)
        return chosen.scatter(1, slots_NK, True)[:, : self.num_experts]

    @cached
    def expert_ids_TK(self) -> Tensor:
        """int64 [T, K], the experts to compute: the decision of each token spread to the tokens."""
        if self.computes_all:
            tokens = self.weights_TK.shape[0]
            return torch.arange(self.num_experts, device=self.weights_TK.device).expand(tokens, -1)
        return self.expert_ids_NK if self.decision_T is None else self.expert_ids_NK[self.decision_T]

    @cached
    def weights_TK(self) -> Tensor:
        """float32 [T, K], differentiable."""
        return self.weights_NK if self.decision_T is None else self.weights_NK[self.decision_T]

    def dense_TE(self) -> Tensor:
        """float32 [T, E], differentiable."""
        dense = self.dense_NE()
        return dense if self.decision_T is None else dense[self.decision_T]

    @property
    def base_weight_T(self) -> Tensor | None:
        """float32 [T], or None for 1."""
        if self.base_weight_N is None or self.decision_T is None:
            return self.base_weight_N
        return self.base_weight_N[self.decision_T]

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen (token, expert) pairs; P is static.

        Returns:
            token_P int64, expert_P int64 (-1 in empty slots), weight_P float32, all [T * K].
        """
        ids_TK, weights_TK = self.expert_ids_TK, self.weights_TK
        tokens, slots = ids_TK.shape
        token_P = torch.arange(tokens, device=ids_TK.device).repeat_interleave(slots, output_size=tokens * slots)
        return token_P, ids_TK.reshape(-1), weights_TK.reshape(-1)

    @cached
    def plan(self) -> RoutePlan:
        """The dispatch plan of this decision, made once and shared by all linears that apply it."""
        from moe_kit_kernels import route_plan

        return route_plan(self.expert_ids_TK, self.num_experts)

    def load_E(self) -> Tensor:
        """How many real decisions chose each expert; padding does not count.

        Returns:
            float32 [E].
        """
        chosen_NE = self.chosen_NE()
        if self.mask_N is not None:
            chosen_NE = chosen_NE & self.mask_N[:, None]
        return chosen_NE.sum(0).float()

    def log_prob_B(self) -> Tensor:
        """Log-probability of all sampled decisions of each sequence, every decision counted once.

        Returns:
            float32 [B].

        Raises:
            RoutingError: if the decision was not sampled.
        """
        if self.log_prob_N is None:
            raise RoutingError("this routing was not sampled: log_prob_B() needs select='sample_k' in training mode.")
        log_prob_N = self.log_prob_N if self.mask_N is None else self.log_prob_N * self.mask_N
        if self.sequence_N is None:
            return log_prob_N
        assert self.num_sequences is not None
        return log_prob_N.new_zeros(self.num_sequences).index_add(0, self.sequence_N, log_prob_N)

    def for_tokens(self, tokens_U: Tensor) -> Routing:
        """The decisions of some tokens, for a bank that is given only these.

        Args:
            tokens_U: int64 [U], indices of tokens.

        Returns:
            A routing of U tokens; decisions that tokens share stay as they are.
        """
        if self.decision_T is not None:
            return replace(self, decision_T=self.decision_T[tokens_U])
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: v[tokens_U] for name, v in values.items() if isinstance(v, Tensor)})

    def with_ids(self, expert_ids_NK: Tensor, weights_NK: Tensor) -> Routing:
        """The same decision points with other experts (replay and forcing)."""
        return replace(
            self,
            sparse_ids_NK=expert_ids_NK,
            sparse_weights_NK=weights_NK,
            selected_NE=None,
            full_weights_NE=None,
            log_prob_N=None,
        )


def leaf_of(value: Any) -> Any:
    """A tensor that needs a gradient as a leaf that needs one; anything else as it is.

    Args:
        value: anything.
    """
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    return value.detach().requires_grad_()
