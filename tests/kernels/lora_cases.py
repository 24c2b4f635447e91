"""Shapes of LoRA experts that break things, and the comparison with the reference: outputs and every gradient."""

import torch

from tests.tolerances import assert_close

CASES = {
    "usual": {"T": 37, "E": 8, "K": 2, "D": 24, "O": 40, "L": 8},
    "rank 1": {"T": 5, "E": 3, "K": 1, "D": 7, "O": 3, "L": 1},
    "odd": {"T": 13, "E": 5, "K": 3, "D": 11, "O": 17, "L": 3},
    "one expert": {"T": 9, "E": 1, "K": 1, "D": 8, "O": 8, "L": 4},
    "one token": {"T": 1, "E": 4, "K": 2, "D": 8, "O": 8, "L": 4},
    "all slots": {"T": 6, "E": 4, "K": 4, "D": 8, "O": 12, "L": 2},
    "no token": {"T": 0, "E": 4, "K": 2, "D": 8, "O": 8, "L": 4},
}


def make(T, E, K, D, O, L, dtype=torch.float64, ids=None):
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    A = torch.randn(E, L, D, dtype=dtype, requires_grad=True)
    B = torch.randn(E, O, L, dtype=dtype, requires_grad=True)
    base = torch.randn(T, O, dtype=dtype, requires_grad=True)
    if ids is None:
        ids = torch.rand(T, E).topk(K).indices if T else torch.zeros(0, K, dtype=torch.long)
    weights = torch.rand(ids.shape, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    return x, A, B, base, ids, weights


def run(function, inputs):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    y = function(**leaves)
    ys = y if isinstance(y, tuple) else (y,)
    generator = torch.Generator().manual_seed(1)
    # numbers that every dtype holds exactly, so that runs in two dtypes see one cotangent
    cotangents = [torch.randn(y_i.shape, generator=generator).bfloat16().to(torch.float16).to(y_i.dtype) for y_i in ys]
    loss = sum((y_i * c).sum() for y_i, c in zip(ys, cotangents, strict=True))
    loss.backward()
    return ys, {n: t.grad for n, t in leaves.items()}


def compare(function, oracle, inputs, dtype=None):
    ys, grads = run(function, inputs)
    expected_ys, expected = run(oracle, inputs)
    for y, y_expected in zip(ys, expected_ys, strict=True):
        assert y.dtype == y_expected.dtype
        assert_close("y", y, y_expected, dtype)
    for name in inputs:
        assert grads[name].dtype == expected[name].dtype
        assert_close(f"d{name}", grads[name], expected[name], dtype)
