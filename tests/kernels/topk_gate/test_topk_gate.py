"""topk_gate: ties and counts first, then equality with the reference, weights and gradient."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kit_kernels import KernelError, topk_gate

from tests.tolerances import assert_close

WAYS = [
    {"score": score, "renormalize": renormalize, "bias_E": bias, "num_groups": groups, "top_groups": top}
    for score, renormalize, bias, (groups, top) in itertools.product(
        ("softmax", "sigmoid"), (True, False), (False, True), ((1, 1), (4, 2))
    )
]


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_ties_go_to_the_lowest_index(rows, k):
    gate = topk_gate(torch.tensor(rows, dtype=torch.float32), k)
    for row, ids in zip(rows, gate.ids_TK.tolist(), strict=True):
        assert ids == sorted(range(6), key=lambda e: (-row[e], e))[:k]
    assert gate.counts_E.tolist() == [sum(ids.count(e) for ids in gate.ids_TK.tolist()) for e in range(6)]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("T", "E", "k"), [(17, 8, 2), (5, 16, 8), (1, 4, 1), (0, 8, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_reference(way, T, E, k, ties):
    way = dict(way)
    if k > E // way["num_groups"] * way["top_groups"]:
        pytest.skip("the groups kept hold fewer than k experts")
    logits = torch.randn(T, E, dtype=torch.float64)
    logits = logits.round() if ties else logits
    way["bias_E"] = torch.randn(E, dtype=torch.float64) if way["bias_E"] else None
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got, expected = topk_gate(a, k, scale=2.5, **way), topk_gate(b, k, scale=2.5, backend="reference", **way)
    assert torch.equal(got.ids_TK, expected.ids_TK)
    assert torch.equal(got.counts_E, expected.counts_E)
    assert_close("weights", got.weights_TK, expected.weights_TK)
    dw = torch.randn(T, k, dtype=torch.float64)
    got.weights_TK.backward(dw)
    expected.weights_TK.backward(dw)
    assert_close("dlogits", a.grad, b.grad)


def test_bias_and_groups_steer_the_choice_only():
    logits = torch.tensor([[3.0, 0.0, 2.9, 2.8]])
    plain = topk_gate(logits, 2, score="sigmoid")
    assert plain.ids_TK.tolist() == [[0, 2]]
    biased = topk_gate(logits, 2, score="sigmoid", bias_E=torch.tensor([-9.0, 0, 0, 0]), renormalize=False)
    assert biased.ids_TK.tolist() == [[2, 3]]
    assert_close("weights", biased.weights_TK, logits[:, 2:].sigmoid())
    # group {2, 3} is worth more than group {0, 1} though expert 0 is the best
    assert topk_gate(logits, 2, score="sigmoid", num_groups=2, top_groups=1).ids_TK.tolist() == [[2, 3]]


def test_unchosen_logits_get_exactly_zero_gradient_when_renormalised():
    logits = torch.randn(9, 8, requires_grad=True)
    gate = topk_gate(logits, 2)
    gate.weights_TK[:, 0].sum().backward()
    unchosen = torch.ones(9, 8).scatter(1, gate.ids_TK, 0.0).bool()
    assert (logits.grad[unchosen] == 0).all()
    assert (logits.grad[~unchosen] != 0).all()


def test_half_precision_logits_give_float32_weights():
    logits = torch.randn(9, 8).bfloat16()
    gate = topk_gate(logits, 2)
    assert gate.weights_TK.dtype == torch.float32
    assert_close("weights", gate.weights_TK, topk_gate(logits.float(), 2).weights_TK)


def test_compiles_without_graph_breaks():
    logits = torch.randn(9, 8)
    compiled = torch.compile(lambda x: topk_gate(x, 2, scale=2.0), fullgraph=True, backend="aot_eager")
    assert_close("weights", compiled(logits).weights_TK, topk_gate(logits, 2, scale=2.0).weights_TK)


def test_bad_input():
    logits = torch.randn(3, 8)
    with pytest.raises(KernelError, match="k is 9"):
        topk_gate(logits, 9)
    with pytest.raises(KernelError, match="score"):
        topk_gate(logits, 2, score="relu")
    with pytest.raises(KernelError, match="group"):
        topk_gate(logits, 3, num_groups=4, top_groups=1)
    with pytest.raises(KernelError, match="floating"):
        topk_gate(logits.long(), 2)
    with pytest.raises(KernelError, match="bias_E"):
        topk_gate(logits, 2, bias_E=torch.zeros(3))
    with pytest.raises(KernelError, match="backend"):
        topk_gate(logits, 2, backend="triton!")
