"""Invariants of the routing plan first, then equality with the plan made by hand."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kit_kernels import KernelError, grouped_mm, lora_experts, route_plan, route_plan_pairs
from moe_kit_kernels.route_plan import native
from moe_kit_kernels.route_plan.reference import route_plan_reference

from tests.kernels.compiled import only_where_it_runs


@st.composite
def pairs(draw):
    T, E, P = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(0, 20))
    token = draw(st.lists(st.integers(-1, T + 1), min_size=P, max_size=P))
    expert = draw(st.lists(st.integers(-1, E + 2), min_size=P, max_size=P))
    return T, E, token, expert


@given(pairs())
@settings(max_examples=80, deadline=None)
def test_pairs_equal_the_plan_made_by_hand(case):
    T, E, token, expert = case
    plan = route_plan_pairs(torch.tensor(token, dtype=torch.int32), torch.tensor(expert, dtype=torch.int32), T, E)
    for name, expected in route_plan_reference(token, expert, T, E).items():
        assert getattr(plan, name).tolist() == expected, name
    assert plan.ends_E.dtype == torch.int32
    kept = plan.host_offsets[-1]
    assert (plan.sorted_expert_P[kept:] == E).all()
    assert plan.sorted_expert_P.diff().ge(0).all()
    assert torch.equal(plan.token_P[plan.token_order_P], plan.token_P.sort(stable=True).values)
    assert plan.token_offsets_T1[-1] == plan.num_pairs


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_table_of_ids_equals_its_pairs(T, K, E, random):
    ids = torch.tensor([[random.randint(-1, E) for _ in range(K)] for _ in range(T)])
    table = route_plan(ids, E)
    free = route_plan_pairs(torch.arange(T).repeat_interleave(K), ids.reshape(-1), T, E)
    for name in ("counts_E", "offsets_E1", "order_P", "inverse_P", "token_order_P", "token_offsets_T1", "expert_P"):
        assert torch.equal(getattr(table, name), getattr(free, name)), name
    weights = torch.rand(T, K)
    dense = torch.zeros(T, E)
    for t in range(T):
        for k in range(K):
            if 0 <= ids[t, k] < E:
                dense[t, ids[t, k]] += weights[t, k]
    torch.testing.assert_close(table.dense_TE(weights), dense)


@only_where_it_runs(native.NATIVE)
@pytest.mark.parametrize(("T", "E", "K"), [(0, 3, 2), (1, 8, 2), (40, 512, 3), (500, 7, 2)])
@pytest.mark.parametrize("free", [False, True])
def test_pieces_in_cpp_equal_those_in_pytorch(T, E, K, free, monkeypatch, poison_empty):
    ids = torch.randint(-1, E + 2, (T, K))
    token_P = torch.randint(-1, T + 1, (T * K,))

    def plan():
        return route_plan_pairs(token_P, ids.reshape(-1), T, E) if free else route_plan(ids, E)

    names = ("order_P", "inverse_P", "sorted_token_P", "sorted_expert_P", "counts_E", "offsets_E1")
    found, slots = plan(), [] if free else plan().slot_plans
    assert native.serves(found)
    pieces = [native.sort_pairs(p) for p in (found, *slots)]
    monkeypatch.setattr(native, "serves", lambda plan: False)
    for own, plain in zip(pieces, [plan(), *([] if free else plan().slot_plans)], strict=True):
        assert set(own) == set(names)
        for name in names:
            assert torch.equal(own[name], getattr(plain, name)), name


def test_a_piece_that_was_read_stays():
    plan = route_plan(torch.tensor([[1, 0]]), 2)
    kept = plan.order_P.clone()
    for name in ("order_P", "inverse_P", "sorted_token_P", "sorted_expert_P", "counts_E", "offsets_E1"):
        plan.__dict__.pop(name, None)
    plan.__dict__["order_P"] = kept
    assert plan.counts_E.tolist() == [1, 1]
    assert plan.order_P is kept


def test_ids_that_changed_behind_a_plan():
    ids = torch.zeros(4, 2, dtype=torch.long)
    plan = route_plan(ids, 4)
    ids.fill_(10**6)
    with pytest.raises((KernelError, RuntimeError, IndexError)):
        _ = plan.counts_E


def test_a_plan_that_was_used_can_be_copied():
    ids = torch.tensor([[1, 0], [0, 2]])
    plan = route_plan(ids, 3)
    x = torch.randn(2, 4)
    grouped_mm(x, torch.randn(3, 5, 4), plan, gather=True)
    lora_experts(x, torch.randn(3, 2, 4), torch.randn(3, 5, 2), None, torch.rand(2, 2), plan=plan)
    again = pickle.loads(pickle.dumps(copy.deepcopy(plan)))
    assert torch.equal(again.order_P, plan.order_P)
    assert torch.equal(again.counts_E, plan.counts_E)


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        assert route_plan(torch.tensor([[1, 0]], device="cpu"), 2).order_P.tolist() == [1, 0]


def test_many_experts_and_no_tokens():
    ids = torch.randint(-1, 512, (40, 3))
    plan = route_plan(ids, 512)
    expected = route_plan_reference(plan.token_P.tolist(), ids.reshape(-1).tolist(), 40, 512)
    assert plan.order_P.tolist() == expected["order_P"]
    empty = route_plan(torch.zeros(0, 2, dtype=torch.long), 4)
    assert empty.counts_E.tolist() == [0] * 4
    assert empty.order_P.shape == (0,)


def test_shapes_do_not_depend_on_the_routing():
    names = ("counts_E", "offsets_E1", "order_P", "inverse_P", "sorted_token_P", "token_offsets_T1")
    shapes = [
        [getattr(route_plan(ids, 4), name).shape for name in names]
        for ids in (torch.full((6, 2), -1), torch.zeros(6, 2, dtype=torch.long), torch.randint(0, 4, (6, 2)))
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_bad_input():
    with pytest.raises(KernelError, match="-2"):
        route_plan(torch.tensor([[0, -2]]), 4)
    with pytest.raises(KernelError, match="integer"):
        route_plan(torch.zeros(2, 2), 4)
    with pytest.raises(KernelError, match="num_experts"):
        route_plan(torch.zeros(2, 2, dtype=torch.long), 0)
    with pytest.raises(KernelError, match=r"\[T, K\]"):
        route_plan(torch.zeros(2, dtype=torch.long), 4)
    with pytest.raises(KernelError, match="Flatten"):
        route_plan_pairs(torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long), 4, 4)
