"""Expert choice: exact loads, independence, schedules, and the causal form."""

from itertools import pairwise

import pytest
import torch

from moe_kit.errors import ConfigError, RoutingError
from moe_kit.routing import Router, RoutingContext, install_step_hook
from moe_kit.routing.expert_choice import (
    SCHEDULES,
    SelectEMAThreshold,
    SelectExpertChoice,
    rank_in_sequence,
    scheduled_k,
)
from moe_kit.routing.scope import Decisions, TokenScope
from moe_kit.routing.score import LinearScore
from moe_kit.routing.weight import CountScaledSoftmaxWeight, SelectedSoftmaxWeight, count_scale
from tests.tolerances import assert_close

E = 4


def layout(lengths, padding=0):
    rows = len(lengths)
    width = max(lengths) + padding
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = True
    sequence = torch.arange(rows).repeat_interleave(width)
    return Decisions(None, sequence_N=sequence, num_sequences=rows, mask_N=mask.flatten()), mask.flatten()


def test_every_expert_takes_its_best_tokens_of_each_sequence():
    torch.manual_seed(1)
    lengths = [9, 4, 1]
    given, mask = layout(lengths, padding=2)
    scores = torch.randn(mask.shape[0], E)
    chosen = SelectExpertChoice(2)(scores, given, RoutingContext()).selected_NE
    assert not chosen[~mask].any()
    for row, length in enumerate(lengths):
        mine = (given.sequence_N == row) & mask
        capacity = max(1, length * 2 // E)
        assert (chosen[mine].sum(0) == capacity).all()
        for expert in range(E):
            best = scores[mine, expert].sort(descending=True, stable=True).indices[:capacity]
            assert set(chosen[mine, expert].nonzero()[:, 0].tolist()) == set(best.tolist())


def test_ranks_equal_a_loop_on_interleaved_sequences():
    torch.manual_seed(2)
    sequence = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    scores = torch.randint(0, 3, (7, 2)).float()
    rank = rank_in_sequence(scores, sequence, 3)
    for s in range(3):
        where = (sequence == s).nonzero()[:, 0]
        for e in range(2):
            order = scores[where, e].sort(descending=True, stable=True).indices
            expected = torch.empty_like(order)
            expected[order] = torch.arange(len(order))
            assert torch.equal(rank[where, e], expected)


def test_a_padding_only_sequence_is_left_alone():
    given, mask = layout([3, 0], padding=1)
    chosen = SelectExpertChoice(1)(torch.randn(8, E), given, RoutingContext()).selected_NE
    assert not chosen[~mask].any()
    assert chosen[mask].any()


def test_softmax_gate_compares_other_things_than_logits():
    torch.manual_seed(3)
    given, _ = layout([12])
    scores = torch.randn(12, E) + torch.randn(12, 1) * 3
    raw = SelectExpertChoice(1)(scores, given, RoutingContext()).selected_NE
    soft = SelectExpertChoice(1, gate="softmax")(scores, given, RoutingContext()).selected_NE
    best = scores.softmax(-1).sort(dim=0, descending=True, stable=True).indices[:3]
    assert torch.equal(soft, torch.zeros(12, E, dtype=torch.bool).scatter(0, best, True))
    assert not torch.equal(raw, soft)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_span_their_range_and_match_flops(name):
    r = (torch.arange(20_000) + 0.5) / 20_000
    k = scheduled_k(r, name, 8, 32)
    assert k.min() == 8
    assert k.max() == 32
    # measured by enumeration in the source's own study: 20 for all of these, 20.03 / 19.97 for the Gaussians
    expected = {"gaussian": 20.03, "gaussian_reverse": 19.97}.get(name, 20.0)
    assert abs(k.mean() - expected) < 0.02
    assert scheduled_k(torch.tensor([0.0, 1.0]), "linear_reverse", 2, 14).tolist() == [14, 2]


def test_capacity_follows_a_named_scalar_by_row():
    given, _ = layout([8, 8])
    select = SelectExpertChoice(1, schedule="linear_reverse", k_min=1, k_max=4)
    context = RoutingContext(scalars={"mask_ratio": torch.tensor([0.0, 1.0])})
    chosen = select(torch.randn(16, E), given, context).selected_NE
    assert (chosen[:8].sum(0) == 8).all()
    assert (chosen[8:].sum(0) == 2).all()
    constant = SelectExpertChoice(2, schedule="linear", k_min=2, k_max=2)
    scores = torch.randn(16, E)
    same = SelectExpertChoice(2)(scores, given, RoutingContext()).selected_NE
    assert torch.equal(constant(scores, given, context).selected_NE, same)
    with pytest.raises(RoutingError, match=r"mask_ratio=\.\.\."):
        select(scores, given, RoutingContext())
    with pytest.raises(ConfigError, match="schedule is 'bell'"):
        SelectExpertChoice(1, schedule="bell", k_min=1, k_max=2)
    with pytest.raises(ConfigError, match="k_min <= k_max"):
        SelectExpertChoice(1, schedule="linear")


def test_count_scale_offsets_the_shrinking_of_averages():
    scale = count_scale(E, 1)
    assert scale[0] == 1.0
    assert abs(scale[1] - 1.0) < 1e-6
    assert all(low < high for low, high in pairwise(scale[1:]))
    # E equal weights would give sqrt(E); unequal ones less
    assert 1 < scale[E] < 2
    given, _ = layout([9])
    logits = torch.randn(9, E)
    selection = SelectExpertChoice(2)(logits, given, RoutingContext())
    plain = SelectedSoftmaxWeight()(logits, selection, False)
    scaled = CountScaledSoftmaxWeight(E)(logits, selection, False)
    count = selection.selected_NE.sum(-1)
    assert_close("sums", scaled.sum(-1), torch.tensor(scale)[count] * (count > 0))
    assert torch.equal(plain.sum(-1) > 0, count > 0)


def ema_router(decay=0.5):
    select = SelectEMAThreshold(E, 1, decay=decay)
    return Router(E, scope=TokenScope(), score=LinearScore(6, E), select=select, weight=SelectedSoftmaxWeight())


def test_thresholds_move_after_the_step_and_settle_at_the_cut_off():
    router = ema_router().train()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    install_step_hook(optimizer, router)
    x = torch.randn(2, 8, 6)
    before = router(x, RoutingContext()).chosen_NE()
    assert torch.equal(router.select.threshold, torch.zeros(E)), "moved before the step"
    optimizer.step()
    logits = (x.flatten(0, 1) @ router.scorer.weight.T).detach()
    # 16 tokens, one of four experts each: the fourth best score; both passes of the step saw the same batch
    cut = logits.sort(dim=0, descending=True).values[3]
    assert_close("first step copies", router.select.threshold, cut)
    after = router(x, RoutingContext()).chosen_NE()
    assert (after.sum(0) == 3).all()
    assert not torch.equal(before, after)
    router.eval()
    kept = router.select.threshold.clone()
    router(x * 3, RoutingContext())
    optimizer.step()
    # the pass in training mode above is counted, the one in evaluation is not
    assert_close("evaluation does not count", router.select.threshold, kept)


def test_the_threshold_form_is_causal_and_the_top_form_is_not():
    x = torch.randn(1, 8, 6)
    y = x.clone()
    y[0, -1] *= -9
    ema = ema_router().eval()
    assert torch.equal(ema(x).chosen_NE()[:-1], ema(y).chosen_NE()[:-1])
    leaky = Router(
        E, scope=TokenScope(), score=ema.scorer, select=SelectExpertChoice(2), weight=SelectedSoftmaxWeight()
    ).eval()
    assert not torch.equal(leaky(x).chosen_NE()[:-1], leaky(y).chosen_NE()[:-1])


def test_padding_does_not_move_a_threshold():
    router = ema_router().train()
    x = torch.randn(1, 6, 6)
    mask = torch.tensor([[True, True, True, True, False, False]])
    totals = []
    for values in (x, torch.cat([x[:, :4], torch.full((1, 2, 6), 1e4)], 1)):
        router.select.counter = None
        router(values, RoutingContext(mask_BS=mask))
        totals.append(router.select.counter)
    assert torch.equal(*totals)
    router(x, RoutingContext(mask_BS=torch.zeros(1, 6, dtype=torch.bool)))
    assert torch.isfinite(router.select.counter).all()
