"""Auxiliary losses: their value when balanced, formulas, gradients by finite differences, padding."""

import math

import pytest
import torch

from moe_kit.errors import ConfigError
from moe_kit.routing import Router, RoutingContext
from moe_kit.routing.balance import LOSSES, ReLUSparsityLoss, mean_loss, stack_routings
from moe_kit.routing.scope import Decisions, TokenScope
from moe_kit.routing.score import LinearScore, NoisyLinearScore
from moe_kit.routing.select import SelectAll, SelectTopK
from moe_kit.routing.threshold import SelectPositive
from moe_kit.routing.weight import ReLUWeight, SelectedSoftmaxWeight, SoftmaxWeight
from tests.tolerances import assert_close

E, K = 4, 2


class FixedScore(torch.nn.Module):
    """Logits given from outside, float64 for finite differences."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, decisions):
        return self.logits


def routing_of(logits, select=None, weight=None, mask=None):
    router = Router(
        E,
        scope=TokenScope(),
        score=FixedScore(logits),
        select=select or SelectTopK(K),
        weight=weight or SoftmaxWeight(),
    )
    context = RoutingContext(mask_BS=mask)
    return router(torch.zeros(1, logits.shape[0], 3), context)


def value(name, logits, **parts):
    loss = ReLUSparsityLoss(K) if name == "relu_l1" else LOSSES[name]
    return mean_loss(loss, stack_routings([routing_of(logits, **parts)]))


# each expert is the first choice of two tokens and the second of two
BALANCED = torch.stack([torch.roll(torch.tensor([3.0, 2.0, 0.0, 0.0]), shift) for shift in (0, 1, 2, 3)] * 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("switch", 1.0),
        ("gshard", 1 / E**2),
        ("cv_importance", 0.0),
        ("maximise_mean_entropy", -1.0),
    ],
)
def test_balanced_routing_has_the_stated_value(name, expected):
    assert abs(value(name, BALANCED) - expected) < 1e-6


@pytest.mark.parametrize("k", [1, 2, 4])
def test_switch_is_one_when_uniform_for_every_k(k):
    assert abs(value("switch", BALANCED, select=SelectTopK(k)) - 1) < 1e-6


def test_an_uneven_router_costs_more():
    uneven = torch.tensor([4.0, 2.0, 0.0, -1.0]).expand(8, E).clone()
    for name in ("switch", "gshard", "cv_importance", "maximise_mean_entropy"):
        assert value(name, uneven) > value(name, BALANCED) + 1e-3


def test_formulas():
    torch.manual_seed(1)
    logits = torch.randn(10, E)
    p = logits.softmax(-1)
    first = torch.nn.functional.one_hot(p.argmax(-1), E).float().mean(0)
    assert_close("gshard", value("gshard", logits), (first * p.mean(0)).sum() / E)
    assert_close("z", value("z", logits), logits.logsumexp(-1).square().mean())
    entropy = -(p * p.log()).sum(-1).mean() / math.log(E)
    assert_close("token entropy", value("minimise_token_entropy", logits), entropy)
    assert_close("its other sign", value("maximise_token_entropy", logits), -entropy)
    mean = p.mean(0)
    assert_close("mean entropy", value("maximise_mean_entropy", logits), (mean * mean.log()).sum() / math.log(E))
    weights = routing_of(logits).dense_NE()
    importance = weights.sum(0)
    expected = importance.var(unbiased=False) / importance.mean() ** 2
    assert_close("importance", value("cv_importance", logits), expected)
    chosen = routing_of(logits).chosen_NE().float()
    share = chosen.mean(0) / K
    assert_close("on weights", value("switch_weights", logits), E * (share * weights.mean(0)).sum())


def test_relu_sparsity_is_the_load_weighted_l1():
    torch.manual_seed(2)
    logits = torch.randn(10, E)
    g = logits.relu()
    f = (E / (K * 10)) * (g > 0).sum(0)
    expected = (f * g).sum() / 10
    assert_close("loss", value("relu_l1", logits, select=SelectPositive(), weight=ReLUWeight()), expected)


@pytest.mark.parametrize("name", [*[name for name in LOSSES if name != "cv_load"], "relu_l1"])
def test_gradients_match_finite_differences(name):
    torch.manual_seed(3)
    logits = torch.randn(5, E, dtype=torch.float64, requires_grad=True)
    relu = name == "relu_l1"
    parts = {"select": SelectPositive(), "weight": ReLUWeight()} if relu else {"weight": SoftmaxWeight()}
    assert torch.autograd.gradcheck(lambda z: value(name, z, **parts), (logits,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", [*[name for name in LOSSES if name != "cv_load"], "relu_l1"])
def test_padding_never_counts(name):
    torch.manual_seed(4)
    logits = torch.randn(6, E)
    padded = torch.cat([logits, torch.full((2, E), 50.0), torch.full((1, E), float("inf"))])
    mask = torch.tensor([[True] * 6 + [False] * 3])
    assert_close(name, value(name, padded, mask=mask), value(name, logits))
    empty = value(name, logits, mask=torch.zeros(1, 6, dtype=torch.bool))
    assert torch.isfinite(empty), "a batch of padding alone"


def test_sites_are_averaged_not_pooled():
    """Opposite imbalances of two layers would cancel if their loads were pooled."""
    one = torch.tensor([5.0, 4.0, 0.0, 0.0]).expand(8, E)
    two = torch.tensor([0.0, 0.0, 5.0, 4.0]).expand(8, E)
    both = mean_loss(LOSSES["switch"], stack_routings([routing_of(one), routing_of(two)]))
    assert_close("mean of sites", both, value("switch", one))
    assert both > 1.5


def noisy_router():
    score = NoisyLinearScore(6, E)
    torch.nn.init.normal_(score.weight)
    torch.nn.init.normal_(score.noise_weight)
    return Router(E, scope=TokenScope(), score=score, select=SelectTopK(K), weight=SelectedSoftmaxWeight())


def test_smooth_load_is_the_chance_of_being_chosen():
    torch.manual_seed(5)
    router = noisy_router().train()
    x = torch.randn(1, 3, 6)
    score = router.score
    noisy = score(Decisions(x[0]))
    chance = noisy.chosen_probability(K)
    draws = 20_000
    for expert in range(E):
        again = noisy.values_NE.expand(draws, 3, E).clone()
        again[..., expert] = noisy.clean_NE[:, expert] + torch.randn(draws, 3) * noisy.std_NE[:, expert]
        chosen = (again.topk(K, dim=-1).indices == expert).any(-1).float().mean(0)
        assert (chosen - chance[:, expert]).abs().max() < 4 * 0.5 / math.sqrt(draws)


def test_cv_load_trains_the_router_and_needs_noise():
    router = noisy_router().train()
    routing = router(torch.randn(2, 9, 6))
    mean_loss(LOSSES["cv_load"], stack_routings([routing])).backward()
    assert router.score.weight.grad.abs().sum() > 0
    assert router.score.noise_weight.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="noisy_linear"):
        value("cv_load", torch.randn(5, E))


def test_noise_starts_balanced_and_is_off_in_evaluation():
    score = NoisyLinearScore(6, E)
    given = Decisions(torch.randn(5, 6))
    assert (score.eval()(given) == 0).all()
    assert score.train()(given).values_NE.abs().sum() > 0


def test_jitter_is_off_in_evaluation_and_never_in_place():
    score = LinearScore(6, E, jitter=0.3)
    x = torch.randn(5, 6)
    kept = x.clone()
    noisy = score.train()(Decisions(x))
    assert torch.equal(x, kept)
    clean = score.eval()(Decisions(x))
    assert_close("clean", clean, x @ score.weight.T)
    assert not torch.equal(noisy, clean)
    ratio = (torch.ones(4000, 6) * 1.0, LinearScore(6, 1, jitter=0.01, init_std=1.0).train())
    spread = ratio[1](Decisions(ratio[0]))
    assert (spread - ratio[1].weight.sum()).abs().max() <= 0.01 * ratio[1].weight.abs().sum() + 1e-6


def test_select_all_is_dense():
    routing = routing_of(torch.randn(3, E), select=SelectAll())
    assert routing.is_dense
    assert routing.load_E().tolist() == [3] * E
