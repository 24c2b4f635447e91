"""The Plackett-Luce law and the leave-one-out estimator, by exhaustive enumeration.

1. the law sums to one, matches Gumbel sampling, and stays finite for a nearly one-hot router;
2. the estimator's expectation is the gradient of the expected loss; the version without denominators is biased;
3. what must not matter does not: equal losses, shifts, choosing all experts.
"""

from itertools import permutations, product

import pytest
import torch

from moe_kit.routing import plackett_luce_log_prob, plackett_luce_set_log_prob, rloo_loss
from moe_kit.routing.context import RoutingContext
from moe_kit.routing.scope import Decisions
from moe_kit.routing.select import SelectSampleK

LOGITS = torch.tensor([0.7, -0.4, 1.3, 0.1], dtype=torch.float64)
ORDERS = torch.tensor(list(permutations(range(4), 2)))
# an arbitrary loss of the set: what an order does not change
LOSS = torch.tensor([[0.0, 1.2, -0.7, 0.3], [1.2, 0.0, 0.5, 2.0], [-0.7, 0.5, 0.0, 0.9], [0.3, 2.0, 0.9, 0.0]]).double()


def losses_of(orders):
    return LOSS[orders[..., 0], orders[..., 1]]


def exact_gradient():
    logits = LOGITS.clone().requires_grad_()
    (plackett_luce_log_prob(logits.expand(12, 4), ORDERS).exp() * losses_of(ORDERS)).sum().backward()
    return logits.grad


def expected_estimate(log_prob, samples):
    """Expectation of the estimator over all M-tuples of ordered selections, under the true law."""
    logits = LOGITS.clone().requires_grad_()
    true = plackett_luce_log_prob(LOGITS.expand(12, 4), ORDERS).exp()
    surrogate = log_prob(logits.expand(12, 4), ORDERS)
    losses = losses_of(ORDERS)
    total = torch.zeros((), dtype=torch.float64)
    for choice in product(range(12), repeat=samples):
        index = list(choice)
        total = total + true[index].prod() * rloo_loss(losses[index], surrogate[index])
    total.backward()
    return logits.grad


def naive_log_prob(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids).sum(-1)


@pytest.mark.parametrize("chosen", [1, 2, 3, 4])
def test_law_sums_to_one(chosen):
    orders = torch.tensor(list(permutations(range(4), chosen)))
    total = plackett_luce_log_prob(LOGITS.expand(len(orders), 4), orders).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-12)


def test_set_form_sums_orders():
    both = plackett_luce_log_prob(LOGITS.expand(2, 4), torch.tensor([[0, 2], [2, 0]])).exp().sum()
    assert plackett_luce_set_log_prob(LOGITS, torch.tensor([0, 2])).exp().item() == pytest.approx(both.item())


def test_sampling_follows_the_law():
    count = 40_000
    select = SelectSampleK(2).train()
    scores = LOGITS.float().expand(count, 4)
    selection = select(scores, Decisions(scores), RoutingContext())
    drawn = selection.ids_NK[:, 0] * 4 + selection.ids_NK[:, 1]
    expected = plackett_luce_log_prob(LOGITS.expand(12, 4), ORDERS).exp()
    counted = torch.bincount(drawn, minlength=16)[ORDERS[:, 0] * 4 + ORDERS[:, 1]].double()
    assert counted.sum() == count
    chi_square = ((counted - count * expected).square() / (count * expected)).sum()
    assert chi_square < 31.3, "11 degrees of freedom, p = 0.001"
    torch.testing.assert_close(
        selection.log_prob_N[:50].double(), plackett_luce_log_prob(LOGITS.expand(50, 4), selection.ids_NK[:50])
    )


@pytest.mark.parametrize("samples", [2, 3])
def test_estimator_is_unbiased(samples):
    torch.testing.assert_close(expected_estimate(plackett_luce_log_prob, samples), exact_gradient())


def test_set_form_is_unbiased():
    torch.testing.assert_close(expected_estimate(plackett_luce_set_log_prob, 2), exact_gradient())


def test_without_denominators_it_is_biased():
    gap = (expected_estimate(naive_log_prob, 2) - exact_gradient()).abs().max()
    assert gap > 0.02


def test_set_form_has_lower_variance():
    variances = {}
    for name, rule in (("ordered", plackett_luce_log_prob), ("set", plackett_luce_set_log_prob)):
        true = plackett_luce_log_prob(LOGITS.expand(12, 4), ORDERS).exp()
        second = 0.0
        for a, b in product(range(12), repeat=2):
            logits = LOGITS.clone().requires_grad_()
            log_prob = rule(logits.expand(2, 4), ORDERS[[a, b]])
            rloo_loss(losses_of(ORDERS[[a, b]]), log_prob).backward()
            second += true[a] * true[b] * logits.grad.square().sum()
        variances[name] = second.item()
    assert variances["set"] < variances["ordered"]


def test_exact_gradient_matches_finite_differences():
    gradient, step = exact_gradient(), 1e-6
    for index in range(4):
        values = []
        for sign in (1, -1):
            logits = LOGITS.clone()
            logits[index] += sign * step
            values.append((plackett_luce_log_prob(logits.expand(12, 4), ORDERS).exp() * losses_of(ORDERS)).sum())
        assert gradient[index].item() == pytest.approx(((values[0] - values[1]) / (2 * step)).item(), abs=1e-8)


def test_all_experts_have_no_expected_gradient():
    orders = torch.tensor(list(permutations(range(4))))
    logits = LOGITS.clone().requires_grad_()
    plackett_luce_log_prob(logits.expand(24, 4), orders).exp().sum().backward()
    assert logits.grad.abs().max() < 1e-12


def test_equal_losses_give_exactly_zero_and_shifts_change_nothing():
    log_probs = torch.randn(4, 3, requires_grad=True)
    rloo_loss(torch.full((4, 3), 2.5), log_probs).backward()
    assert torch.equal(log_probs.grad, torch.zeros(4, 3))
    losses = torch.randn(4, 3).double()
    first = rloo_loss(losses, log_probs.detach().double())
    assert rloo_loss(losses + 7, log_probs.detach().double()).item() == pytest.approx(first.item(), abs=1e-9)


def test_leave_one_out_form():
    losses, log_probs = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    others = (losses.sum(0) - losses) / 4
    assert rloo_loss(losses, log_probs).item() == pytest.approx((((losses - others) * log_probs).sum() / 5).item())


def test_nearly_one_hot_stays_finite():
    logits = torch.tensor([60.0, 0.0, -1.0], requires_grad=True)
    ids = torch.tensor([0, 2])
    value = plackett_luce_log_prob(logits, ids)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    # the control: one minus the cumulative sum cancels to zero
    q = logits.detach().softmax(-1)
    assert not (q[2].log() - (1 - q[0]).log()).isfinite() or (1 - q[0]) == 0


def test_empty_slots_contribute_nothing():
    full = plackett_luce_log_prob(LOGITS, torch.tensor([2, 0]))
    assert torch.equal(plackett_luce_log_prob(LOGITS, torch.tensor([2, 0, -1])), full)
    # an empty slot in the middle removes nobody
    assert torch.equal(plackett_luce_log_prob(LOGITS, torch.tensor([2, -1, 0])), full)


@pytest.mark.parametrize("slots", [[0, -1, 2], [-1, 2, 0], [-1, -1, 1], [2, -1, 0]])
def test_empty_slots_change_neither_the_law_nor_its_gradient(slots):
    """An empty slot points at no expert: it neither gives back one that is gone nor stops the gradient of one that stays."""
    found = []
    for ids in (slots, [e for e in slots if e >= 0]):
        logits = LOGITS.clone().requires_grad_()
        value = plackett_luce_log_prob(logits, torch.tensor(ids))
        found.append((value.detach(), *torch.autograd.grad(value, logits)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2 samples"):
        rloo_loss(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="must match"):
        rloo_loss(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="distinct experts"):
        plackett_luce_log_prob(torch.zeros(2), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="at most 4"):
        plackett_luce_set_log_prob(torch.zeros(9), torch.arange(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_at_least_float32(dtype):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert plackett_luce_log_prob(torch.zeros(3, dtype=dtype), torch.tensor([1])).dtype == wide
    assert rloo_loss(torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype)).dtype == wide
