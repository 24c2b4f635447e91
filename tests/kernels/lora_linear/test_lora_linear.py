"""lora_linear and its groups equal the reference; what they keep, and what they refuse."""

import pytest
import torch
from moe_kit_kernels import (
    KernelError,
    lora_linear,
    lora_linear_group,
)

from tests.kernels.lora_cases import CASES, compare, make, run
from tests.tolerances import assert_close


def test_linear_equals_reference(poison_empty):
    x, A, B, _, ids, weights = make(**CASES["usual"])
    W, bias = torch.randn(40, 24, dtype=torch.float64), torch.randn(40, dtype=torch.float64)

    def call(which):
        return lambda x, A, B, weights, W, bias: lora_linear(x, W, bias, A, B, ids, weights, scale=1.5, backend=which)

    compare(call("dense"), call("reference"), {"x": x, "A": A, "B": B, "weights": weights, "W": W, "bias": bias})


@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 3)])
@pytest.mark.parametrize("every", [False, True])
def test_group_equals_single_calls(ranks, every, poison_empty):
    T, E, D = 11, 4, 10
    x = torch.randn(T, D, dtype=torch.float64)
    ids = None if every else torch.tensor([[0, -1], [1, 2], [3, 3]] * 4)[:T]
    inputs = {"x": x, "weights": torch.rand(T, E if every else 2, dtype=torch.float64)}
    for i, (L, O) in enumerate(zip(ranks, (6, 9, 12), strict=True)):
        inputs[f"A{i}"] = torch.randn(E, L, D, dtype=torch.float64)
        inputs[f"B{i}"] = torch.randn(E, O, L, dtype=torch.float64)
        inputs[f"W{i}"] = torch.randn(O, D, dtype=torch.float64)

    def part(name, tensors):
        return [tensors[f"{name}{i}"] for i in range(3)]

    def grouped(x, weights, **rest):
        return lora_linear_group(x, part("W", rest), [None] * 3, part("A", rest), part("B", rest), ids, weights)

    def single(x, weights, **rest):
        parts = zip(part("W", rest), part("A", rest), part("B", rest), strict=True)
        return tuple(lora_linear(x, W, None, A, B, ids, weights, backend="reference") for W, A, B in parts)

    compare(grouped, single, inputs)


def test_only_wanted_gradients():
    x, A, B, _, ids, weights = make(**CASES["usual"])
    W = torch.randn(40, 24, dtype=torch.float64)
    full = {"x": x, "A": A, "B": B, "weights": weights}
    _, expected = run(lambda x, A, B, weights: lora_linear(x, W, None, A, B, ids, weights), full)
    for name in full:
        leaves = {n: t.detach().clone().requires_grad_(n == name) for n, t in full.items()}
        generator = torch.Generator().manual_seed(1)
        y = lora_linear(leaves["x"], W, None, leaves["A"], leaves["B"], ids, leaves["weights"])
        (y * torch.randn(y.shape, generator=generator).bfloat16().to(torch.float16).to(y.dtype)).sum().backward()
        assert_close(f"d{name}", leaves[name].grad, expected[name])


def test_saved_tensors_are_the_promised_ones():
    x, A, B, _, ids, weights = make(T=64, E=8, K=2, D=24, O=40, L=4, dtype=torch.float32)
    W = torch.randn(40, 24)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, W, None, A, B, ids, weights)
    known = {t.data_ptr() for t in (x, A, B, weights)}
    extra = [tuple(t.shape) for t in saved if t.data_ptr() not in known]
    assert extra == [(64 * 2, 4)], extra


def test_checkpointing_and_no_grad_and_autocast():
    from torch.utils.checkpoint import checkpoint

    x, A, B, _, ids, weights = make(**CASES["usual"], dtype=torch.float32)
    W = torch.randn(40, 24)
    inputs = {"x": x, "A": A, "B": B, "weights": weights}
    plain = lambda x, A, B, weights: lora_linear(x, W, None, A, B, ids, weights)  # noqa: E731
    compare(lambda **k: checkpoint(lambda: plain(**k), use_reentrant=False), plain, inputs)
    with torch.no_grad():
        assert_close("y", plain(x, A, B, weights), plain(x, A, B, weights.detach()))

    def cast(**k):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(**k)

    ys, grads = run(cast, inputs)
    expected_ys, expected = run(plain, inputs)
    assert ys[0].dtype == torch.bfloat16
    assert_close("y", ys[0], expected_ys[0], torch.bfloat16)
    for name in inputs:
        assert grads[name].dtype == torch.float32
        assert_close(f"d{name}", grads[name], expected[name], torch.bfloat16)


def test_frozen_weight_changed_between_forward_and_backward_raises():
    x, A, B, _, ids, weights = make(**CASES["usual"])
    W = torch.randn(40, 24, dtype=torch.float64)
    y = lora_linear(x, W, None, A, B, ids, weights)
    W.mul_(2)
    with pytest.raises(KernelError, match="changed in"):
        y.sum().backward()
