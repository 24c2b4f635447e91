"""Run by test_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os

import pytest
import torch
from moe_kit_kernels import token_gather, token_scatter

from tests.tolerances import assert_close

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("bound", [None, 7])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("keep", [[False] * 5, [True] * 5, [False, True, True, False, True], [], [True]], ids=str)
def test_equals_the_reference(keep, base, bound, weighted, dtype, poison_empty):
    keep_T = torch.tensor(keep, dtype=torch.bool)
    x, matrix, upstream = torch.randn(len(keep), 6), torch.randn(6, 6), torch.randn(len(keep), 6)
    results = {}
    for backend in ("reference", "triton"):
        x_ = x.to(dtype).requires_grad_()
        w_ = torch.linspace(0.5, 2, len(keep)).requires_grad_() if weighted else None
        x_ND, index_N = token_gather(x_, keep_T, bound=bound, backend=backend)
        stream = dict(base_TD=x_) if base else dict(base_TD=None, num_tokens=len(keep))
        y = token_scatter(torch.tanh(x_ND @ matrix.to(dtype)), index_N, **stream, weights_T=w_, backend=backend)
        if y.requires_grad:
            # the reference has nothing to differentiate without a slot and a base
            y.backward(upstream.to(dtype))
        results[backend] = [y, x_.grad, w_.grad if weighted else None]
    for name, actual, expected in zip(("y", "dx", "dw"), results["triton"], results["reference"]):
        if expected is not None:
            assert_close(name, actual, expected, dtype)
        else:
            assert actual is None or not actual.any()


def test_unused_slots_may_hold_anything():
    x = torch.randn(3, 70)
    x_ND, index_N = token_gather(x, torch.tensor([False, True, False]), bound=3, backend="triton")
    y_ND = x_ND.clone()
    y_ND[1:] = float("nan")
    w = torch.tensor([float("nan"), 1.0, float("nan")], requires_grad=True)
    y = token_scatter(y_ND, index_N, x, weights_T=w, backend="triton")
    y.sum().backward()
    assert not y.isnan().any()
    assert w.grad[0] == w.grad[2] == 0
    assert not w.grad.isnan().any()
