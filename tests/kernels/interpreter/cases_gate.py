"""Run by test_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import itertools
import os

import pytest
import torch
from moe_kit_kernels import topk_gate
from moe_kit_kernels.topk_gate import triton_autograd

from tests.tolerances import assert_close

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"


@pytest.mark.parametrize(("score", "renormalize"), itertools.product(("softmax", "sigmoid"), (True, False)))
@pytest.mark.parametrize(("T", "E", "k"), [(70, 8, 2), (5, 13, 3), (3, 4, 4), (1, 1, 1), (0, 8, 2), (9, 200, 5)])
@pytest.mark.parametrize("ties", [False, True])
def test_gate(score, renormalize, T, E, k, ties, poison_empty):
    logits = torch.randn(T, E)
    logits = logits.round() if ties else logits
    bias = torch.randn(E).round() if ties and T != 5 else None
    check(score, renormalize, logits, k, bias)


def check(score, renormalize, logits, k, bias):
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    how = {"score": score, "renormalize": renormalize, "bias_E": bias, "scale": 2.5}
    got, expected = topk_gate(a, k, backend="triton", **how), topk_gate(b, k, backend="reference", **how)
    assert torch.equal(got.ids_TK, expected.ids_TK)
    assert torch.equal(got.counts_E, expected.counts_E)
    assert_close("weights", got.weights_TK, expected.weights_TK)
    dw = torch.randn(got.ids_TK.shape)
    got.weights_TK.backward(dw)
    expected.weights_TK.backward(dw)
    assert_close("dlogits", a.grad, b.grad)


def test_scores_of_minus_infinity_are_chosen_last_and_once():
    logits = torch.tensor([[0.0, float("-inf"), float("-inf"), float("-inf")]])
    gate = topk_gate(logits, 3, backend="triton")
    assert gate.ids_TK.tolist() == topk_gate(logits, 3, backend="reference").ids_TK.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("kernel", "index"), [("topk_gate_kernel", 7), ("topk_gate_backward_kernel", 6)])
def test_planted_bugs_are_caught(kernel, index, monkeypatch, poison_empty):
    # one token too few: a tail mask that is off by one
    right = getattr(triton_autograd, kernel)

    class Wrong:
        def __getitem__(self, grid):
            return lambda *args, **options: right[grid](*args[:index], args[index] - 1, *args[index + 1 :], **options)

    monkeypatch.setattr(triton_autograd, kernel, Wrong())
    with pytest.raises(AssertionError):
        check("softmax", True, torch.randn(5, 8), 2, None)
