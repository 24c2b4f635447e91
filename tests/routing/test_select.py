"""Selections against enumeration and brute force."""

import math

import pytest
import torch

from moe_kit.errors import ConfigError
from moe_kit.routing.capacity import SelectCapacity
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.router import Router
from moe_kit.routing.scope import Decisions, TokenScope
from moe_kit.routing.score import LinearScore
from moe_kit.routing.select import SelectAll, SelectSampleK, SelectTopK, stable_top_k
from moe_kit.routing.threshold import ExcessWeight, SelectLearnedThreshold, SelectPositive, SelectTopP
from moe_kit.routing.weight import ConstantWeight, SelectedSoftmaxWeight
from tests.tolerances import assert_close

CONTEXT = RoutingContext()


def decisions(tokens, lengths=None, x=None, mask=None):
    if lengths is None:
        return Decisions(x, mask_N=mask, num_sequences=1, sequence_N=torch.zeros(tokens, dtype=torch.long))
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Decisions(x, mask_N=mask, num_sequences=len(lengths), sequence_N=sequence)


def test_ties_go_to_the_lowest_index():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert stable_top_k(scores, 2).tolist() == [[1, 2]]
    assert stable_top_k(torch.zeros(1, 200), 3).tolist() == [[0, 1, 2]]


def test_absolute_top_k_compares_magnitudes():
    scores = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
    assert SelectTopK(2, absolute=True)(scores, decisions(1), CONTEXT).ids_NK.tolist() == [[1, 2]]
    assert SelectTopK(2)(scores, decisions(1), CONTEXT).ids_NK.tolist() == [[2, 0]]


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_group_limit_equals_brute_force_also_for_negative_scores(shift):
    torch.manual_seed(2)
    scores = torch.randn(50, 12) + shift
    chosen = SelectTopK(3, num_groups=4, groups_kept=2)(scores, decisions(50), CONTEXT).ids_NK
    masked_with_zero = 0
    for row, ids in zip(scores, chosen):
        groups = row.view(4, 3)
        worth = [sum(sorted(group.tolist())[-2:]) for group in groups]
        kept = sorted(range(4), key=lambda g: -worth[g])[:2]
        allowed = [g * 3 + i for g in kept for i in range(3)]
        assert ids.tolist() == sorted(allowed, key=lambda e: -row[e])[:3]
        # the known wrong version masks dropped groups with 0, which wins over negative scores
        wrong = torch.zeros(12)
        wrong[allowed] = row[allowed]
        masked_with_zero += stable_top_k(wrong[None], 3).tolist()[0] != ids.tolist()
    assert masked_with_zero > 0 or shift == 0


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="groups_kept is 3"):
        SelectTopK(2, num_groups=2, groups_kept=3)
    with pytest.raises(ConfigError, match="5 experts"):
        SelectTopK(2, num_groups=2)(torch.zeros(1, 5), decisions(1), CONTEXT)
    # two experts would be chosen from groups that were dropped
    few = SelectTopK(4, num_groups=4, groups_kept=1)
    with pytest.raises(ConfigError, match="1 of 4 groups hold 2 of 8 experts"):
        few(torch.zeros(1, 8), decisions(1), CONTEXT)
    full = SelectTopK(4, num_groups=4, groups_kept=2)(torch.arange(8.0)[None], decisions(1), CONTEXT)
    assert sorted(full.ids_NK[0].tolist()) == [4, 5, 6, 7]


def test_top_p_is_the_smallest_set_that_reaches_p():
    torch.manual_seed(3)
    scores = torch.randn(40, 6) * 2
    selected = SelectTopP(0.7)(scores, decisions(40), CONTEXT).selected_NE
    probability = scores.softmax(-1)
    for p, chosen in zip(probability, selected):
        mass = p[chosen].sum()
        assert mass >= 0.7 - 1e-6
        assert mass - p[chosen].min() < 0.7
        assert p[chosen].min() >= (p[~chosen].max() if (~chosen).any() else 0)
    sure = torch.tensor([[50.0, 0.0, 0.0]])
    assert SelectTopP(0.01)(sure, decisions(1), CONTEXT).selected_NE.tolist() == [[True, False, False]]
    with pytest.raises(ConfigError, match="p is 0"):
        SelectTopP(0.0)


def test_positive_may_choose_none():
    selected = SelectPositive()(torch.tensor([[-1.0, 0.0], [0.1, -1.0]]), decisions(2), CONTEXT).selected_NE
    assert selected.tolist() == [[False, False], [True, False]]


def test_learned_threshold_is_the_formula_and_always_keeps_one():
    torch.manual_seed(4)
    x, scores = torch.randn(30, 5), torch.randn(30, 4, requires_grad=True)
    select = SelectLearnedThreshold(5, 4)
    torch.nn.init.normal_(select.weight, std=3.0)
    selection = select(scores, decisions(30, x=x), CONTEXT)
    threshold = torch.sigmoid(x @ select.weight.T + select.bias) / 4
    assert_close("threshold", selection.threshold_N1, threshold)
    assert torch.equal(selection.selected_NE, scores.softmax(-1) >= threshold)
    assert selection.selected_NE.any(-1).all()
    weights = ExcessWeight()(scores, selection, True)
    expected = (scores.softmax(-1) - threshold).clamp_min(0)
    assert_close("weights", weights, expected / expected.sum(-1, keepdim=True))
    weights[:, 0].sum().backward()
    assert select.weight.grad.abs().sum() > 0, "the threshold learns through the weights"


def test_sampling_follows_plackett_luce():
    torch.manual_seed(15)
    logits = torch.tensor([0.5, -0.3, 1.1])
    draws = SelectSampleK(2).train()(logits.expand(60_000, 3), decisions(60_000), CONTEXT).ids_NK
    q = logits.softmax(-1)
    for i in range(3):
        for j in range(3):
            if i == j:
                continue
            share = ((draws[:, 0] == i) & (draws[:, 1] == j)).float().mean()
            expected = q[i] * q[j] / (1 - q[i])
            assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 60_000)


def brute_capacity(scores, lengths, k, factor, policy):
    """Places handed out one token after the other."""
    start, rows = 0, []
    for length in lengths:
        part = scores[start : start + length]
        start += length
        places = math.ceil(factor * k * length / scores.shape[1])
        used = [0] * scores.shape[1]
        choices = stable_top_k(part, k).tolist()
        kept = [[-1] * k for _ in choices]
        order = [(t, j) for t in range(length) for j in range(k)]
        if policy == "gshard":
            order = [(t, j) for j in range(k) for t in range(length)]
        for t, j in order:
            expert = choices[t][j]
            if used[expert] < places:
                used[expert] += 1
                kept[t][j] = expert
        rows += kept
    return rows


@pytest.mark.parametrize(("policy", "k"), [("switch", 1), ("switch", 2), ("gshard", 2)])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_capacity_equals_handing_out_places(policy, k, factor):
    torch.manual_seed(6)
    lengths = [7, 5, 9]
    scores = torch.randn(21, 4) + torch.tensor([2.0, 0, 0, 0])
    select = SelectCapacity(k, factor=factor, policy=policy).eval()
    found = select(scores, decisions(21, lengths), CONTEXT).ids_NK.tolist()
    assert found == brute_capacity(scores, lengths, k, factor, policy)
    assert any(-1 in row for row in found), "nothing was dropped: the case tests nothing"


def test_padding_takes_no_place_and_no_share_of_the_capacity():
    scores = torch.tensor([[3.0, 0.0]] * 6)
    mask = torch.tensor([False, False, True, True, True, True])
    select = SelectCapacity(1, factor=1.0)
    found = select(scores, decisions(6, mask=mask), CONTEXT).ids_NK[:, 0].tolist()
    assert found == [-1, -1, 0, 0, -1, -1]


def test_second_choices_are_tried_with_twice_their_gate():
    torch.manual_seed(7)
    logits = torch.tensor([1.0, 0.0, -9.0, -9.0]).expand(40_000, 4)
    select = SelectCapacity(2, factor=9.0, policy="gshard").train()
    tried = (select(logits, decisions(40_000), CONTEXT).ids_NK[:, 1] >= 0).float().mean()
    assert abs(tried - 2 * torch.tensor([1.0, 0.0]).softmax(-1)[1]) < 0.01


def test_gshard_gates_are_normalised_before_the_drop():
    scores = torch.tensor([[2.0, 1.0, -9.0]] * 4)
    select = SelectCapacity(2, factor=0.75, policy="gshard").eval()
    selection = select(scores, decisions(4), CONTEXT)
    weights = SelectedSoftmaxWeight()(scores, selection, False)
    gate = torch.tensor([2.0, 1.0]).softmax(-1)
    expected = torch.where(selection.ids_NK >= 0, gate, 0.0)
    assert (selection.ids_NK < 0).any()
    assert_close("weights", weights, expected)


def test_capacity_refuses_nonsense():
    for options in ({"policy": "first"}, {"group": "row"}, {"factor": 0.0}, {"policy": "gshard"}):
        with pytest.raises(ConfigError):
            SelectCapacity(1, **options)


def test_exchanged_parts_are_obeyed():
    """A router decides by one operator where it can; parts that were exchanged afterwards end that."""

    def router(select, weight):
        torch.manual_seed(0)
        return Router(4, scope=TokenScope(), score=LinearScore(8, 4), select=select, weight=weight)

    x = torch.randn(1, 5, 8)
    for select, weight in ((SelectAll(), SelectedSoftmaxWeight()), (SelectTopK(2), ConstantWeight(0.5))):
        exchanged, wanted = router(SelectTopK(2), SelectedSoftmaxWeight()), router(select, weight)
        before = exchanged(x).dense_NE()
        exchanged.select, exchanged.weight = select, weight
        assert torch.equal(exchanged(x).dense_NE(), wanted(x).dense_NE())
        assert not torch.equal(exchanged(x).dense_NE(), before)


@pytest.mark.parametrize(("policy", "leaks"), [("switch", False), ("gshard", True)])
def test_only_gshard_lets_a_later_token_decide_about_an_earlier_one(policy, leaks):
    """Two tokens with equal choices, one place in each expert; the second token's choices are changed."""
    select = SelectCapacity(2, factor=0.5, policy=policy).eval()
    one = torch.tensor([[3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 2.0]])
    two = torch.tensor([[3.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 2.0]])
    before, after = (select(scores, decisions(2), CONTEXT).ids_NK[0].tolist() for scores in (one, two))
    assert before == [0, 1]
    assert after == ([0, -1] if leaks else before)
