"""`Router`: scope, score, select, weight - four small choices that make one `Routing`.

    decisions = scope(x)           which decisions there are
    logits    = score(decisions)   what each expert is worth, float32
    selection = select(logits)     which experts are used
    weights   = weight(logits, selection)

Recorded ids replace the selection (replay), the weights stay live.

Shapes: B rows, S sequence, T = B*S tokens, N decisions, D width, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.errors import RoutingError
from moe_kit.routing.balance import BalanceLoss
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.decision import Routing
from moe_kit.routing.frozen import trainable_kinds
from moe_kit.routing.plain import is_untouched
from moe_kit.routing.schedule import FreezeSchedule
from moe_kit.routing.scope import Decisions, Scope, TokenScope, pool_mean
from moe_kit.routing.score import NoisyLogits, is_plain_linear
from moe_kit.routing.select import Selection, is_plain_top_k
from moe_kit.routing.step import StepOwner, StepState
from moe_kit.routing.weight import SelectedSoftmaxWeight, Weight


class Router(StepOwner):
    """Makes a `Routing` from an input and a context.

    Args:
        num_experts: E.
        scope: names the decisions.
        score: module from `Decisions` to logits [N, E].
        select: module from (scores, decisions, context) to a `Selection`.
        weight: rule from logits and selection to weights.
        losses: name -> (coefficient, loss) of auxiliary losses for this router.
        detach_input: no gradient to `x`: a policy router is trained by its own estimator alone.
        stepper: state that shifts the scores used for the choice, or the losses, and moves once an optimizer step.
        freeze_after: optimizer steps after which score and selection stay as they are; None = never.
        frozen: they stay as they are from the start, whatever moves once a step included.

    Attributes:
        site: name under which decisions are recorded and replayed; set by whoever owns the router.
        group: routers of one group (an adapter) average their losses over their sites; groups add up.
        banks: the experts that it routes, if whoever owns it told. A router without trainable parameters is trained
            as long as these are.
    """

    # what is chosen are experts; metrics of load and collapse are about these
    has_experts = True

    site: str = "router"
    group: str = ""

    def __init__(
        self,
        num_experts: int,
        *,
        scope: Scope,
        score: nn.Module,
        select: nn.Module,
        weight: Weight,
        losses: dict[str, tuple[float, BalanceLoss]] | None = None,
        detach_input: bool = False,
        stepper: StepState | None = None,
        freeze_after: int | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.scope, self.weight = scope, weight
        # not named `score`: PEFT takes any module whose name ends so for a classifier's head, and saves a copy of it
        self.scorer, self.select, self.stepper = score, select, stepper
        self.losses = dict(losses or {})
        self.detach_input, self.frozen = detach_input, frozen
        # plain: their layers own them
        self.banks: list[nn.Module] = []
        self.freeze = None
        if freeze_after is not None:
            # NOTE: registered behind the states that it puts back, since they move in this order
            held = [score, select] if stepper is None or not _shifts_choice(stepper) else [score, select, stepper]
            self.freeze = FreezeSchedule(freeze_after, held)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # logits, thresholds and balance biases stay float32 when a model is cast: bfloat16 loses a step of 1e-3
        def keep_width(value: Tensor) -> Tensor:
            moved = fn(value)
            if value.is_floating_point() and moved.element_size() < value.element_size():
                return value.to(moved.device)
            return moved

        return super()._apply(keep_width, recurse)

    @property
    def is_policy(self) -> bool:
        """True if the choice is sampled and only a policy gradient trains this router."""
        # of the class: a missing attribute of a module costs microseconds
        return hasattr(type(self.select), "log_prob")

    @property
    def is_frozen(self) -> bool:
        """True if score and selection stay as they are, so that their balance state must stay as well.

        Either somebody said so, or there is something to train and none of it is (an adapter loaded for inference).
        """
        if self.frozen:
            return True
        kinds = self._kinds()
        return bool(kinds) and not any(value.requires_grad for value in kinds)

    def trained_with(self) -> list[nn.Parameter]:
        """Parameters whose optimizer moves the step states: its own, or those of its experts."""
        return [value for value in self._kinds() if value.requires_grad]

    def _kinds(self) -> list[nn.Parameter]:
        return trainable_kinds(self) or [value for bank in self.banks for value in trainable_kinds(bank)]

    def coefficient(self, name: str) -> Tensor | float:
        """Coefficient of an auxiliary loss, as its schedule or controller has it now.

        Args:
            name: a key of `losses`.
        """
        coefficient: Tensor | float = self.losses[name][0]
        return coefficient if self.stepper is None else coefficient * self.stepper.loss_factor(name)

    def constant_weights(self, task_id: int | None = None) -> Tensor | None:
        """Weights of all experts, if they do not depend on the input.

        Args:
            task_id: row of a task table.

        Returns:
            float32 [E] as in evaluation, or None if the routing reads its input.

        Raises:
            RoutingError: if the task id is out of range.
        """
        if not hasattr(self.scorer, "constant_logits") or getattr(self.select, "reads_tokens", False):
            return None
        logits_1E = self.scorer.constant_logits(task_id)
        if logits_1E is None:
            return None
        training = self.training
        try:
            self.eval()
            scores = logits_1E if self.stepper is None else self.stepper(logits_1E)
            selection = self.select(scores, Decisions(None), RoutingContext())
            return self._routing(logits_1E, selection, Decisions(None)).dense_NE()[0].detach()
        finally:
            self.train(training)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Decide.

        Args:
            x: float [B, S, D], or [T, D] for one sequence (or for flattened rows when the context has a mask).
            context: the forward pass; None = no padding, one sequence a row, nothing recorded.

        Returns:
            The decision, registered in the context.

        Raises:
            RoutingError: if the context does not fit the input, or replayed ids are out of range.
        """
        context = context or RoutingContext()
        if self._fuses_for(x, context):
            return self._register(self._gate(x, context), context)
        if context.policy_gradient and self.training and self.is_policy:
            # a forward-only pass still needs the gradient of log Q with respect to the router itself
            with torch.enable_grad():
                return self._decide(x, context)
        return self._decide(x, context)

    def _decide(self, x: Tensor, context: RoutingContext) -> Routing:
        x_BSD = as_rows(x.detach() if self.detach_input else x, context)
        decisions = self.scope.decisions(x_BSD, context)
        logits_NE, noisy = self._logits(decisions)
        decisions = replace(decisions, x_ND=None) if decisions.pool_T is not None else decisions
        logits_NE = self._carried(x_BSD, logits_NE, context)
        if context.prior_BE is not None:
            logits_NE = logits_NE + self._prior(x_BSD, decisions, context)
        scores_NE = logits_NE if self.stepper is None else self.stepper(logits_NE)

        forced = self._forced(x_BSD, decisions, context)
        if isinstance(forced, Routing):
            routing = replace(forced, logits_NE=logits_NE)
        else:
            if forced is None:
                selection = self.select(scores_NE, decisions, context)
            elif hasattr(self.select, "replayed"):
                selection = self.select.replayed(forced.ids_NK, scores_NE, decisions)
            else:
                selection = forced
            routing = self._routing(logits_NE, selection, decisions)
        if noisy is not None:
            routing = replace(routing, chance_NE=noisy.chosen_probability(routing.expert_ids_NK.shape[1]))
        return self._register(routing, context)

    def _register(self, routing: Routing, context: RoutingContext) -> Routing:
        context.routings[self.site] = routing
        if context.is_open:
            context.registered.append((self.site, routing, self))
            states = self.step_states if self.training else []
            if states and context.counts_states and not self.is_frozen:
                for state in states:
                    state.observe(routing, context.counts)
        return routing

    def _fuses_for(self, x: Tensor, context: RoutingContext) -> bool:
        """Whether one operator gives logits, choice and weights: plain parts, nothing from outside, and nobody listens."""
        if x.dim() != 3 or not context.is_free or torch.compiler.is_compiling():
            return False
        if self.detach_input or self.freeze is not None or self.stepper is not None:
            return False
        if type(self.scope) is not TokenScope or type(self.weight) is not SelectedSoftmaxWeight:
            return False
        # from the dictionary: attribute lookup in a module is slow enough to be seen at one token
        score, select = self._modules["scorer"], self._modules["select"]
        # looked at in every pass: parts may be exchanged, and PEFT's `modules_to_save` may wrap one
        return is_plain_linear(score) and is_plain_top_k(select) and is_untouched(score) and is_untouched(select)

    def gate_parameters(self, x: Tensor, context: RoutingContext) -> tuple[Tensor, int] | None:
        """What an operator needs that decides and applies the decision at one go; `decided` then completes it.

        Args:
            x: float [B, S, D], the input.
            context: the forward pass.

        Returns:
            (weight [E, D], K) of `weights = softmax of the K best of x W^T`, or None if this router does more than that.
        """
        if not (self._fuses_for(x, context) and is_untouched(self)):
            return None
        score: Any = self._modules["scorer"]
        select: Any = self._modules["select"]
        return score.weight, select.k

    def decided(
        self, x: Tensor, context: RoutingContext, logits_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor
    ) -> Routing:
        """The routing that an operator decided with `gate_parameters`, registered in the context.

        Args:
            x: float [B, S, D], the input.
            context: the forward pass.
            logits_NE: float32 [T, E].
            ids_NK: int64 [T, K], best first.
            weights_NK: float32 [T, K].

        Returns:
            As `forward`.
        """
        tokens = context.tokens_of(x.shape[0], x.shape[1], x.device)
        return self._register(Routing.of_tokens(self.num_experts, ids_NK, weights_NK, logits_NE, *tokens), context)

    def _gate(self, x_BSD: Tensor, context: RoutingContext) -> Routing:
        """The routing of a linear score for each token, top-k and a softmax over the chosen, by one operator."""
        batch, length, width = x_BSD.shape
        from moe_kit_kernels import topk_gate
        from moe_kit_kernels.topk_gate.cpu import LinearGate, gate

        score, k = self._modules["scorer"], self._modules["select"].k
        x_ND, weight_ED = x_BSD.reshape(-1, width), score._parameters["weight"]
        plain = x_ND.dtype is weight_ED.dtype is torch.float32 and x_ND.device.type == "cpu"
        if not plain or torch.is_autocast_enabled("cpu"):
            logits_NE = score(Decisions(x_ND))
            ids_NK, weights_NK, _ = topk_gate(logits_NE, k)
        elif torch.is_grad_enabled():
            logits_NE, ids_NK, weights_NK = LinearGate.apply(x_ND, weight_ED, k)
        else:
            logits_NE = torch.nn.functional.linear(x_ND, weight_ED)
            ids_NK, weights_NK = gate(logits_NE, k)
        return Routing.of_tokens(
            self.num_experts, ids_NK, weights_NK, logits_NE, *context.tokens_of(batch, length, x_ND.device)
        )

    @property
    def step_states(self) -> list[StepState]:
        """Parts that count and move once an optimizer step."""
        return [part for part in (self.stepper, self.select, self.freeze) if isinstance(part, StepState)]

    def _logits(self, decisions: Decisions) -> tuple[Tensor, NoisyLogits | None]:
        logits = self.scorer(decisions)
        noisy = logits if isinstance(logits, NoisyLogits) else None
        logits = logits if noisy is None else noisy.values_NE
        if decisions.pool_T is None:
            return logits, noisy
        values = logits if self.scope.pool == "logits" else logits.softmax(-1)
        pooled = pool_mean(values, decisions.decision_T, decisions.num_sequences, decisions.pool_T)
        return (pooled if self.scope.pool == "logits" else pooled.clamp_min(1e-20).log()), None

    def _carried(self, x_BSD: Tensor, logits_NE: Tensor, context: RoutingContext) -> Tensor:
        """Logits of the prompt while decoding: a decision about a sequence is made once and then obeyed."""
        if context.carried is None or not self.scope.outlives_forward:
            return logits_NE
        kept_BE = context.carried.get(self.site)
        if kept_BE is None:
            context.carried[self.site] = logits_NE.detach()
            return logits_NE
        return context.rows(kept_BE, x_BSD.shape[0], "decisions carried from the prompt").to(logits_NE)

    def _prior(self, x_BSD: Tensor, decisions: Decisions, context: RoutingContext) -> Tensor:
        prior_BE = context.rows(context.prior_BE, x_BSD.shape[0], "prior").to(x_BSD.device).float()
        if prior_BE.shape[1] != self.num_experts:
            raise RoutingError(f"the prior has {prior_BE.shape[1]} experts, expected {self.num_experts}.")
        return prior_BE[row_of_decision(x_BSD, decisions)]

    def _forced(self, x_BSD: Tensor, decisions: Decisions, context: RoutingContext) -> Selection | Routing | None:
        """Replayed or forced experts for this site, if any."""
        ids_NK = None
        if context.replay is not None and self.site in context.replay:
            ids_NK = context.replay[self.site].to(x_BSD.device)
            expected = _num_decisions(x_BSD, decisions)
            if ids_NK.shape[0] != expected:
                raise RoutingError(
                    f"the replayed record has {ids_NK.shape[0]} decisions at {self.site}, the forward pass {expected}: "
                    "replay on the same batch that was recorded."
                )
        elif context.forced_sites is None or self.site in context.forced_sites:
            if context.forced_ids_BK is not None:
                rows_BK = context.rows(context.forced_ids_BK, x_BSD.shape[0], "forced expert ids").to(x_BSD.device)
                ids_NK = rows_BK[row_of_decision(x_BSD, decisions)]
            elif context.forced_weights_BE is not None:
                rows_BE = context.rows(context.forced_weights_BE, x_BSD.shape[0], "forced weights").to(x_BSD.device)
                if rows_BE.shape[1] != self.num_experts:
                    raise RoutingError(
                        f"the forced weights have {rows_BE.shape[1]} experts, {self.site} has {self.num_experts}: "
                        "name the sites that they are meant for."
                    )
                weights_NE = rows_BE[row_of_decision(x_BSD, decisions)].float()
                return self._wrap(decisions, selected_NE=weights_NE != 0, full_weights_NE=weights_NE)
        if ids_NK is None:
            return None
        check_ids(ids_NK, self.num_experts, self.site)
        return Selection(ids_NK=ids_NK)

    def _routing(self, logits_NE: Tensor, selection: Selection, decisions: Decisions) -> Routing:
        weights = self.weight(logits_NE, selection, self.training)
        computes_all = getattr(self.weight, "computes_all", False)
        if computes_all:
            selection = Selection(selected_NE=selection.chosen_NE(self.num_experts), log_prob_N=selection.log_prob_N)
        log_prob_N = selection.log_prob_N
        if log_prob_N is None and self.training and self.is_policy and selection.ids_NK is not None:
            log_prob_N = self.select.log_prob(logits_NE, selection.ids_NK)
        stored = (
            {"sparse_ids_NK": selection.ids_NK, "sparse_weights_NK": weights}
            if selection.ids_NK is not None
            else {"selected_NE": selection.selected_NE, "full_weights_NE": weights}
        )
        return self._wrap(decisions, logits_NE=logits_NE, log_prob_N=log_prob_N, computes_all=computes_all, **stored)

    def _wrap(self, decisions: Decisions, **stored: Any) -> Routing:
        return Routing(
            num_experts=self.num_experts,
            sequence_N=decisions.sequence_N,
            num_sequences=decisions.num_sequences,
            decision_T=decisions.decision_T,
            mask_N=decisions.mask_N,
            **stored,
        )


def _shifts_choice(stepper: StepState) -> bool:
    """Whether a state takes part in the choice, as a balance bias does; others steer coefficients of losses."""
    return type(stepper).choice_scores is not StepState.choice_scores


def as_rows(x: Tensor, context: RoutingContext) -> Tensor:
    """View an input as [B, S, D].

    Args:
        x: [B, S, D], [T, D], or with more leading dimensions.
        context: its mask tells the rows of a flattened input.

    Returns:
        [B, S, D]; one row if nothing tells the rows.
    """
    if x.dim() == 3:
        return x
    if x.dim() > 3:
        return x.reshape(x.shape[0], -1, x.shape[-1])
    if context.mask_BS is not None and context.mask_BS.numel() == x.shape[0]:
        return x.view(*context.mask_BS.shape, x.shape[-1])
    return x.unsqueeze(0)


def row_of_decision(x_BSD: Tensor, decisions: Decisions) -> Tensor:
    """Batch row of each decision, int64 [N].

    Raises:
        RoutingError: if sequences are packed, so that a row holds several decisions of sequence scope.
    """
    batch, length, _ = x_BSD.shape
    if decisions.decision_T is None:
        return torch.arange(batch, device=x_BSD.device).repeat_interleave(length, output_size=batch * length)
    if decisions.num_sequences != batch:
        raise RoutingError("values given per row (prior, forced experts) cannot be used with packed sequences.")
    return torch.arange(batch, device=x_BSD.device)


def check_ids(ids_NK: Tensor, num_experts: int, site: str) -> None:
    """Refuse ids outside [-1, E) and an expert chosen twice by one decision.

    Raises:
        RoutingError: naming the site and the range found.
    """
    if ids_NK.numel() == 0:
        return
    low, high = int(ids_NK.min()), int(ids_NK.max())
    if low < -1 or high >= num_experts:
        raise RoutingError(f"expert ids at {site} lie in [{low}, {high}], expected [-1, {num_experts - 1}].")
    ordered = ids_NK.sort(-1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise RoutingError(f"expert ids at {site} name an expert twice in one decision.")


def _num_decisions(x_BSD: Tensor, decisions: Decisions) -> int:
    if decisions.decision_T is None:
        return x_BSD.shape[0] * x_BSD.shape[1]
    assert decisions.sequence_N is not None
    return decisions.sequence_N.shape[0]
