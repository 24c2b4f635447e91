"""Weights and scores against their formulas; the estimators against exact gradients."""

import math

import pytest
import torch

from moe_kit.errors import ConfigError, RoutingError
from moe_kit.routing import Router, RoutingContext
from moe_kit.routing.scope import Decisions, RequestScope, SequenceScope, TaskScope, TokenScope
from moe_kit.routing.score import (
    FrozenSparseScore,
    LinearScore,
    MLPScore,
    PrototypeScore,
    TaskTableScore,
    UniformScore,
)
from moe_kit.routing.select import SelectAll, Selection, SelectTopK
from moe_kit.routing.weight import (
    DenseMixerWeight,
    RelaxedBernoulliWeight,
    SelectedSoftmaxWeight,
    SigmoidWeight,
    SoftmaxWeight,
    StraightThroughWeight,
)
from tests.tolerances import assert_close

N, E, K, D = 7, 6, 2, 5
ALL = Selection(selected_NE=torch.ones(N, E, dtype=torch.bool))


def top(logits):
    return Selection(ids_NK=logits.topk(K).indices)


def test_renormalised_softmax_equals_softmax_over_the_chosen():
    logits = torch.randn(N, E)
    full = logits.softmax(-1).gather(-1, top(logits).ids_NK)
    assert_close("weights", SelectedSoftmaxWeight()(logits, top(logits), True), full / full.sum(-1, keepdim=True))


def test_an_empty_choice_has_zero_weights_and_a_finite_gradient():
    logits = torch.randn(1, E, requires_grad=True)
    nothing = Selection(ids_NK=torch.full((1, K), -1))
    for weight in (SelectedSoftmaxWeight(), SoftmaxWeight(), SigmoidWeight(renormalise=True), DenseMixerWeight()):
        weights = weight(logits, nothing, True)
        assert (weights == 0).all()
        weights.sum().backward()
        assert torch.isfinite(logits.grad).all()


def test_sigmoid_gates_of_deepseek():
    logits = torch.randn(N, E)
    gates = logits.sigmoid().gather(-1, top(logits).ids_NK)
    expected = 2.5 * gates / (gates.sum(-1, keepdim=True) + 1e-20)
    assert_close("weights", SigmoidWeight(renormalise=True, factor=2.5)(logits, top(logits), True), expected)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_relaxed_bernoulli_sums_to_one_in_each_group_and_is_sigmoid_in_evaluation(groups):
    logits = torch.randn(N, E)
    weight = RelaxedBernoulliWeight(groups=groups)
    for training in (True, False):
        sums = weight(logits, ALL, training).view(N, groups, -1).sum(-1)
        assert_close("sums", sums, torch.ones(N, groups))
    coins = logits.sigmoid().view(N, groups, -1)
    assert_close("evaluation", weight(logits, ALL, False).view(N, groups, -1), coins / coins.sum(-1, keepdim=True))
    assert not torch.equal(weight(logits, ALL, True), weight(logits, ALL, True))


def test_relaxed_bernoulli_has_its_law():
    """Of a relaxed coin z with temperature 1, P(z > 1/2) = sigmoid(logit)."""
    logits = torch.tensor([[-1.0, 0.0, 2.0]]).expand(40_000, 3)
    torch.manual_seed(21)
    distribution = torch.distributions.RelaxedBernoulli(torch.tensor(1.0), logits=logits)
    ours = RelaxedBernoulliWeight(groups=3)  # one expert a group: z / z
    assert_close("normalised away", ours(logits, Selection(selected_NE=logits < 9), True), torch.ones_like(logits))
    pair = RelaxedBernoulliWeight(groups=1)(logits, Selection(selected_NE=logits < 9), True)
    z = distribution.sample()
    expected = z / z.sum(-1, keepdim=True)
    for moment in (1, 2):
        difference = (pair**moment).mean(0) - (expected**moment).mean(0)
        assert difference.abs().max() < 5 * 0.35 / math.sqrt(40_000) * math.sqrt(2)


def test_straight_through_is_one_in_value_with_the_softmax_gradient():
    logits = torch.randn(N, E, requires_grad=True)
    coefficient = torch.randn(N, K)
    weights = StraightThroughWeight()(logits, top(logits), True)
    assert (weights == 1).all()
    (weights * coefficient).sum().backward()
    soft = logits.detach().clone().requires_grad_()
    (soft.softmax(-1).gather(-1, top(logits).ids_NK) * coefficient).sum().backward()
    assert_close("gradient", logits.grad, soft.grad)


def test_straight_through_gumbel_sees_the_noise_of_the_choice():
    select = SelectTopK(1, gumbel=True).train()
    logits = torch.zeros(4000, E)
    selection = select(logits, Decisions(None), RoutingContext())
    assert torch.equal(selection.ids_NK[:, 0], selection.scores_NE.argmax(-1))
    share = torch.bincount(selection.ids_NK[:, 0], minlength=E) / 4000
    assert (share - 1 / E).abs().max() < 0.03
    assert select.eval()(logits, Decisions(None), RoutingContext()).scores_NE is None


@pytest.mark.parametrize("renormalise", [True, False])
def test_dense_mixer_value_is_sparse_router_gradient_dense_expert_gradient_sparse(renormalise):
    torch.manual_seed(8)
    logits = torch.randn(N, E, requires_grad=True)
    experts = torch.randn(E, 3, requires_grad=True)
    selection = top(logits)
    weights = DenseMixerWeight(renormalise)(logits, selection, True)
    sparse = (SelectedSoftmaxWeight() if renormalise else SoftmaxWeight())(logits, selection, True)
    y = weights @ experts
    assert_close("value", y, torch.einsum("nk,nko->no", sparse, experts[selection.ids_NK]))
    upstream = torch.randn(N, 3)
    y.backward(upstream)
    # the experts get what the sparse mixture gives them
    mask = selection.chosen_NE(E)
    assert_close("experts", experts.grad, (weights.detach() * mask).T @ upstream)
    unused = ~mask.any(0)
    assert (experts.grad[unused] == 0).all()
    # the router gets what a dense mixture would give, with Z held fixed for the others
    p_in = logits.detach().clone().requires_grad_()
    p = p_in.softmax(-1)
    total = (p * mask).sum(-1, keepdim=True) if renormalise else torch.ones(N, 1)
    w = p * mask / total + p * ~mask / total.detach()
    (w @ experts.detach()).backward(upstream)
    assert_close("router", logits.grad, p_in.grad)
    sparse_only = logits.detach().clone().requires_grad_()
    rule = SelectedSoftmaxWeight() if renormalise else SoftmaxWeight()
    torch.einsum("nk,nko->no", rule(sparse_only, selection, True), experts.detach()[selection.ids_NK]).backward(
        upstream
    )
    assert not torch.allclose(sparse_only.grad, logits.grad), "equal to the sparse gradient: the case tests nothing"


@pytest.mark.parametrize(
    ("activation", "module"),
    [("gelu", torch.nn.GELU()), ("silu", torch.nn.SiLU()), ("relu", torch.nn.ReLU()), ("tanh", torch.nn.Tanh())],
)
def test_mlp_score_is_two_linears_with_a_non_linearity(activation, module):
    score = MLPScore(D, E, hidden=7, activation=activation)
    torch.nn.init.normal_(score.up.bias)
    plain = torch.nn.Sequential(torch.nn.Linear(D, 7), module, torch.nn.Linear(7, E))
    plain.load_state_dict(dict(zip(plain.state_dict(), score.state_dict().values(), strict=True)))
    x = torch.randn(9, D)
    assert_close("logits", score(Decisions(x)), plain(x))
    score(Decisions(x)).square().sum().backward()
    plain(x).square().sum().backward()
    for name, (own, expected) in enumerate(zip(score.parameters(), plain.parameters(), strict=True)):
        assert_close(str(name), own.grad, expected.grad)
    # float32 whatever the model's dtype, under autocast as well
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = score(Decisions(x.bfloat16()))
    assert half.dtype is torch.float32
    assert_close("half", half, plain(x.bfloat16().float()))


def test_mlp_score_refuses_what_it_cannot_compute():
    with pytest.raises(ConfigError, match="activation is 'gleu', expected one of gelu"):
        MLPScore(D, E, activation="gleu")
    with pytest.raises(ConfigError, match="0 units"):
        MLPScore(D, E, hidden=0)


@pytest.mark.parametrize("metric", PrototypeScore.METRICS)
def test_prototype_metrics(metric):
    x = torch.randn(N, D)
    score = PrototypeScore(D, E, metric=metric, temperature=0.5)
    p = score.prototypes.detach()
    expected = {
        "dot": x @ p.T,
        "absolute": (x @ p.T).abs(),
        "cosine": (x @ p.T) / (x.norm(dim=-1, keepdim=True) * p.norm(dim=-1)),
        "layer_norm": (
            ((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt())
            @ ((p - p.mean(-1, keepdim=True)) / (p.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()).T
            / math.sqrt(D)
        ),
    }[metric]
    assert_close(metric, score(Decisions(x)), expected / 0.5)


def test_prototypes_may_be_given_and_frozen():
    given = torch.randn(E, D)
    score = PrototypeScore(D, E, prototypes_ED=given, trainable=False)
    assert not any(value.requires_grad for value in score.parameters())
    assert torch.equal(score.state_dict()["prototypes"], given)
    with pytest.raises(ConfigError, match="euclid"):
        PrototypeScore(D, E, metric="euclid")


def test_frozen_sparse_projection():
    torch.manual_seed(9)
    score = FrozenSparseScore(400, 32, density=0.25)
    assert not any(value.requires_grad for value in score.parameters())
    assert ((score.A != 0).sum(-1) == 100).all()
    assert abs(float(score.A[score.A != 0].std()) * 32 - 1) < 0.05
    x = torch.randn(3, 400)
    assert_close("scores", score(Decisions(x)), x @ score.A.T)
    same, again = FrozenSparseScore(400, 32, seed=23), FrozenSparseScore(400, 32, seed=23)
    assert torch.equal(same.A, again.A)
    # projections of two seeds are nearly orthogonal, of one seed not
    other = FrozenSparseScore(400, 32, seed=24)
    assert (same.A @ other.A.T).norm() < 0.5 * (same.A @ again.A.T).norm()
    with pytest.raises(ConfigError, match="density"):
        FrozenSparseScore(8, 2, density=0)


def test_absolute_choice_keeps_more_energy_than_signed():
    """The known figures for Gaussian inputs: 71 % against 45 % of the squared norm, 32 rows, 8 chosen."""
    torch.manual_seed(10)
    score = FrozenSparseScore(1024, 32)
    logits = score(Decisions(torch.randn(2000, 1024)))
    for absolute, expected in ((True, 0.71), (False, 0.45)):
        chosen = SelectTopK(8, absolute=absolute)(logits, Decisions(None), RoutingContext()).chosen_NE(32)
        share = ((logits * chosen).square().sum(-1) / logits.square().sum(-1)).mean()
        assert abs(float(share) - expected) < 0.02


def sequence_router(scope):
    torch.manual_seed(3)
    return Router(E, scope=scope, score=LinearScore(D, E, init_std=1.0), select=SelectTopK(K), weight=SoftmaxWeight())


@pytest.mark.parametrize("pool", ["inputs", "logits", "probabilities"])
def test_sequence_scope_pools_the_prompt_alone(pool):
    router = sequence_router(SequenceScope(pool)).eval()
    x = torch.randn(2, 6, D)
    mask = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    prompt = torch.tensor([[False, True, True, False, False, False], [True, True, True, True, False, False]])
    logits = router(x, RoutingContext(mask_BS=mask, prompt_mask_BS=prompt)).logits_NE
    for row in range(2):
        tokens = x[row][prompt[row]]
        each = tokens @ router.scorer.weight.T
        expected = {
            "inputs": tokens.mean(0) @ router.scorer.weight.T,
            "logits": each.mean(0),
            "probabilities": each.softmax(-1).mean(0).log(),
        }[pool]
        assert_close(pool, logits[row], expected)


def test_request_scope_ignores_packing():
    x = torch.randn(2, 6, D)
    packed = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 3, 3]])
    context = RoutingContext(sequence_BS=packed, num_sequences=4)
    assert sequence_router(SequenceScope())(x, context).num_decisions == 4
    assert sequence_router(RequestScope())(x, context).num_decisions == 2


@pytest.mark.parametrize("scope", [SequenceScope(), RequestScope()])
def test_a_carried_decision_is_obeyed_and_beams_repeat_it(scope):
    router = sequence_router(scope).eval()
    prompt = RoutingContext(carried={})
    first = router(torch.randn(2, 6, D), prompt)
    kept = prompt.carried[router.site]
    assert_close("kept", kept, first.logits_NE)
    later = router(torch.randn(6, 1, D), RoutingContext(carried={router.site: kept}))
    assert torch.equal(later.expert_ids_NK, first.expert_ids_NK.repeat_interleave(3, 0))
    free = router(torch.randn(2, 1, D), RoutingContext())
    assert not torch.equal(free.logits_NE, first.logits_NE)


def test_token_decisions_are_never_carried():
    router = sequence_router(TokenScope())
    context = RoutingContext(carried={})
    router(torch.randn(2, 3, D), context)
    assert context.carried == {}


def test_constant_weights_of_parts():
    uniform = Router(E, scope=TokenScope(), score=UniformScore(E), select=SelectAll(), weight=SoftmaxWeight())
    assert_close("uniform", uniform.constant_weights(), torch.full((E,), 1 / E))
    table = Router(E, scope=TaskScope(3), score=TaskTableScore(3, E), select=SelectAll(), weight=SoftmaxWeight())
    assert_close("row", table.constant_weights(2), table.scorer.weight.detach()[2].softmax(-1))
    assert table.constant_weights() is None
    with pytest.raises(RoutingError, match="task id 3"):
        table.constant_weights(3)
    assert sequence_router(TokenScope()).constant_weights() is None
