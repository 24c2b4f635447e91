"""Auxiliary losses: their value when balanced, formulas, gradients by finite differences, padding."""

import math
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from moe_kit.errors import ConfigError, RoutingError
from moe_kit.routing import Router, RoutingContext
from moe_kit.routing.balance import LOSSES, ReLUSparsityLoss, mean_loss, stack_routings
from moe_kit.routing.scope import Decisions, TokenScope
from moe_kit.routing.score import LinearScore, NoisyLinearScore
from moe_kit.routing.select import SelectAll, SelectTopK
from moe_kit.routing.threshold import SelectPositive
from moe_kit.routing.typed_balance import TypedCVLoss
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
    score = router.scorer
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
    assert router.scorer.weight.grad.abs().sum() > 0
    assert router.scorer.noise_weight.grad.abs().sum() > 0
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


class TestTyped:
    """LoRAMoE's balance of two types of experts and data."""

    TYPES = (0, 1)

    def routing(self, weights_BSE, mask=None):
        """Weights of a softmax over all experts, as given."""
        router = Router(
            weights_BSE.shape[-1],
            scope=TokenScope(),
            score=FixedScore(weights_BSE.flatten(0, 1).log()),
            select=SelectAll(),
            weight=SoftmaxWeight(),
        )
        return router(torch.zeros(*weights_BSE.shape[:2], 3), RoutingContext(mask_BS=mask))

    def loss(self, weights_BSE, types=TYPES, mask=None, **options):
        return mean_loss(TypedCVLoss(**options), stack_routings([self.routing(weights_BSE, mask)], types))

    @staticmethod
    def random(batch=2, length=5, experts=E):
        return torch.randn(batch, length, experts, generator=torch.Generator().manual_seed(6)).softmax(-1)

    def test_the_formula(self):
        weights, delta = self.random(), 0.3
        z = [
            [weights[b, :, e].mean() * (1 - delta if (e >= 2) == (b == 1) else 1 + delta) for e in range(E)]
            for b in range(2)
        ]
        z = torch.tensor(z)
        assert_close("loss", self.loss(weights, delta=delta), z.var(unbiased=False) / z.mean() ** 2)
        # the wrong way round, and without types
        swapped = self.loss(weights, types=(1, 0), delta=delta)
        assert (swapped - self.loss(weights, delta=delta)).abs() > 1e-3
        plain = weights.mean(1)
        assert_close("delta 0", self.loss(weights, delta=0.0), plain.var(unbiased=False) / plain.mean() ** 2)

    def test_its_minimum_leans_to_the_own_experts(self):
        delta = 0.4
        logits = torch.zeros(2, 3, E, requires_grad=True)
        optimizer = torch.optim.Adam([logits], 0.05)
        for _ in range(300):
            optimizer.zero_grad()
            self.loss(logits.softmax(-1), delta=delta).backward()
            optimizer.step()
        share = logits.detach().softmax(-1).mean(1)
        assert self.loss(logits.softmax(-1), delta=delta) < 1e-5
        assert_close("row of type 0", share[0, 0] / share[0, 2], torch.tensor(1.4 / 0.6))
        assert_close("row of type 1", share[1, 3] / share[1, 1], torch.tensor(1.4 / 0.6))

    def test_plain_importance_does_not_see_types(self):
        """The control: swapping the rows' types changes nothing of CV of importance over the batch."""
        weights = self.random()
        leaning = torch.tensor([[0.35, 0.35, 0.15, 0.15], [0.15, 0.15, 0.35, 0.35]])[:, None].expand(2, 5, E)
        assert mean_loss(LOSSES["cv_importance"], stack_routings([self.routing(leaning)])) < 1e-6
        assert self.loss(leaning, delta=0.4) < 1e-5
        assert self.loss(leaning, types=(1, 0), delta=0.4) > 0.1
        assert self.loss(weights, types=0) != self.loss(weights, types=1)

    def test_gradient_by_finite_differences(self):
        logits = torch.randn(2, 3, E, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: self.loss(z.softmax(-1), delta=0.2), (logits,), eps=1e-6, atol=1e-5)

    def test_padding_and_length_never_count(self):
        weights = self.random()
        padded = torch.cat([torch.full((2, 3, E), 0.25), weights], 1)
        mask = torch.tensor([[False] * 3 + [True] * 5] * 2)
        assert_close("padding", self.loss(padded, mask=mask), self.loss(weights))
        longer = torch.cat([weights, weights], 1)
        assert_close("length", self.loss(longer), self.loss(weights))
        empty = torch.zeros(2, 5, dtype=torch.bool)
        assert self.loss(weights, mask=empty).isfinite()
        one = torch.tensor([[True] * 5, [False] * 5])
        assert_close("a row of padding", self.loss(weights, mask=one), self.loss(weights[:1], types=(0,)))

    @pytest.mark.parametrize(
        ("types", "options", "error", "match"),
        [
            (None, {}, RoutingError, "needs the type of each row"),
            ((0, 1, 1), {}, RoutingError, "3 values but the batch 2"),
            ((0, 2), {}, RoutingError, "0 and 1 only"),
            ((0, 1), {"expert_types": [0, 1]}, RoutingError, "names 2 experts, the router has 4"),
            ((0, 1), {"expert_types": [0, 1, 2, 0]}, ConfigError, "0 and 1 only"),
            ((0, 1), {"delta": 1.0}, ConfigError, r"expected a number in \[0, 1\)"),
        ],
    )
    def test_mistakes(self, types, options, error, match):
        with pytest.raises(error, match=match):
            self.loss(self.random(), types=types, **options)

    def test_through_a_model(self):
        """The preset takes it as an option; the loss reaches the model's own, and types come with `routing_inputs`."""
        from moe_kit import RoutedAdapterConfig, routing_inputs, routing_losses
        from tests.tiny import batch_of, tiny_llama

        config = RoutedAdapterConfig.from_preset(
            "dense_lora_moe",
            r=2,
            num_experts=4,
            target_modules=["q_proj"],
            score_options={"init_std": 0.0},
            losses={"cv_typed": 0.5},
            loss_options={"cv_typed": {"delta": 0.25, "expert_types": [0, 1, 0, 1]}},
        )
        model, batch = get_peft_model(tiny_llama(), config).train(), batch_of()
        with pytest.raises(RoutingError, match="needs the type"):
            model(**batch)
        with routing_inputs(model, task_types=[0, 1]):
            loss = model(**batch).loss
        (typed,) = routing_losses(model).values()
        # routers start at zero: every weight is 1/4, and Z is 1/4 (1 -+ delta)
        assert_close("value", typed.detach(), torch.tensor(0.25**2))
        with torch.no_grad():
            plain = model.eval()(**batch).loss
        assert_close("in the loss", loss.detach(), plain + 0.5 * typed.detach())
        with pytest.raises(ConfigError, match="loss_options do not fit the loss 'cv_typed'"):
            get_peft_model(tiny_llama(), replace(config, loss_options={"cv_typed": {"detla": 0.1}}))
        with pytest.raises(ConfigError, match="not among the losses"):
            get_peft_model(tiny_llama(), replace(config, loss_options={"switch": {}}))
