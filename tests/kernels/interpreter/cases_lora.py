"""Run by test_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os

import pytest
import torch
from moe_kit_kernels import lora_experts, lora_linear
from moe_kit_kernels.lora_experts import launch, tiles
from moe_kit_kernels.route_plan import route_plan

from tests.tolerances import assert_close

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"

# ids [T, K], E, D, O, L: widths below, at and above a tile; ranks odd and wider than a column block
EDGES = {
    "balanced": ([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2]], 4, 24, 20, 8),
    "odd widths": ([[0, 1], [1, 2], [2, 1]], 3, 67, 33, 3),
    "wider than a tile": ([[0, 1], [1, 0]], 2, 136, 130, 16),
    "taller than a tile": ([[0, 2]] * 40 + [[1, 0]] * 27, 3, 16, 16, 4),
    "more experts than a block": ([[0, 19], [17, 3], [16, 15]], 20, 16, 16, 8),
    "all to one, others empty": ([[1]] * 19, 3, 16, 16, 2),
    "rank 1": ([[0, 1], [1, 0]], 2, 8, 8, 1),
    "rank 129": ([[0, 1], [1, 0]], 2, 16, 16, 129),
    "one expert": ([[0]] * 3, 1, 16, 16, 4),
    "one token": ([[2, 0, 1]], 3, 16, 8, 4),
    "empty slots": ([[0, -1], [-1, -1], [5, 1], [1, 7]], 2, 16, 16, 4),
    "nothing chosen": ([[-1, -1], [-1, -1]], 2, 16, 16, 4),
    "one expert twice": ([[1, 1], [0, 0]], 2, 16, 16, 4),
    "no token": ([], 3, 16, 8, 4),
}


def make(edge, dtype=torch.float32):
    rows, E, D, O, L = EDGES[edge]
    ids = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 2)
    T = ids.shape[0]
    return ids, {
        "x": torch.randn(T, D).to(dtype),
        "A": (torch.randn(E, L, D) / D**0.5).to(dtype),
        "B": (torch.randn(E, O, L) / L**0.5).to(dtype),
        "weights": torch.rand(ids.shape),
        "base": torch.randn(T, O).to(dtype),
        "W": (torch.randn(O, D) / D**0.5).to(dtype),
        "bias": torch.randn(O).to(dtype),
    }


def run(function, tensors):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.float16).to(y.dtype)
    y.backward(upstream)
    return {"y": y} | {name: t.grad for name, t in leaves.items()}


def compare(function, tensors, dtype=torch.float32):
    expected, actual = run(lambda **t: function("reference", **t), tensors), run(function_of(function), tensors)
    for name, value in expected.items():
        assert_close(name, actual[name], value, dtype)


def function_of(function):
    return lambda **t: function(BACKEND, **t)


BACKEND = "dense"


@pytest.fixture(params=["dense", "sorted"])
def backend(request, monkeypatch):
    monkeypatch.setitem(globals(), "BACKEND", request.param)


@pytest.mark.parametrize("edge", EDGES)
def test_experts(edge, backend, poison_empty):
    ids, t = make(edge)
    del t["W"], t["bias"]
    compare(
        lambda how, x, A, B, weights, base: lora_experts(x, A, B, ids, weights, base_TO=base, scale=0.7, backend=how), t
    )


@pytest.mark.parametrize("edge", ["balanced", "empty slots"])
def test_experts_without_base(edge, backend, poison_empty):
    ids, t = make(edge)
    del t["W"], t["bias"], t["base"]
    compare(lambda how, x, A, B, weights: lora_experts(x, A, B, ids, weights, backend=how), t)


def linear(how, x, W, bias, A, B, weights, plan):
    if how == "reference":
        return lora_linear(x, W, bias, A, B, None, weights, plan=plan, scale=0.7, backend="reference")
    from moe_kit_kernels.lora_experts.triton_autograd import TritonLora

    return TritonLora.apply("dense", plan, 0.7, True, x, weights, W, bias, A, B)


@pytest.mark.parametrize("edge", EDGES)
def test_linear(edge, poison_empty):
    ids, t = make(edge)
    del t["base"]
    plan = route_plan(ids, t["A"].shape[0])
    compare(lambda how, **k: linear(how, plan=plan, **k), t)


@pytest.mark.parametrize("edge", EDGES)
def test_decode(edge, poison_empty):
    ids, t = make(edge)
    with torch.no_grad():
        for base in (None, t["base"]):
            args = (t["x"], t["A"], t["B"], ids, t["weights"])
            y = lora_experts(*args, base_TO=base, scale=0.7, backend="decode")
            assert_close("y", y, lora_experts(*args, base_TO=base, scale=0.7, backend="reference"))


def test_half_precision(backend, poison_empty):
    ids, t = make("balanced", torch.float16)
    del t["W"], t["bias"]
    compare(
        lambda how, x, A, B, weights, base: lora_experts(x, A, B, ids, weights, base_TO=base, backend=how),
        t,
        torch.float16,
    )


def test_wide_adapters_on_a_half_precision_base(poison_empty):
    ids, t = make("balanced", torch.float32)
    del t["W"], t["bias"]
    t["x"], t["base"] = t["x"].half(), t["base"].half()
    compare(
        lambda how, x, A, B, weights, base: lora_experts(x, A, B, ids, weights, base_TO=base, backend=how),
        t,
        torch.float16,
    )


def test_strided_inputs(backend):
    ids, t = make("balanced")
    del t["W"], t["bias"]

    def function(how, x, A, B, weights, base):
        x, base = x.T.contiguous().T, torch.stack([base, base], 2)[:, :, 0]
        A, B = A.transpose(1, 2).contiguous().transpose(1, 2), B.transpose(0, 1).contiguous().transpose(0, 1)
        return lora_experts(x, A, B, ids, weights, base_TO=base, backend=how)

    compare(function, t)


def test_columns_in_several_groups(monkeypatch, poison_empty):
    # groups of one column block each: the order that keeps a block of y in cache between slots
    monkeypatch.setattr(tiles, "L2_BYTES", 1)
    ids, t = make("wider than a tile")
    H, plan = torch.randn(ids.numel(), 16), route_plan(ids, 2)
    got = launch.up_sorted(H, t["B"], plan, torch.float32, weights=t["weights"], base_TO=t["base"])
    assert_close("y", got, launch.up_dense(H, t["B"], plan, torch.float32, weights=t["weights"], base_TO=t["base"]))


def test_results_repeat_bit_by_bit(backend):
    ids, t = make("taller than a tile")
    del t["W"], t["bias"]

    def function(x, A, B, weights, base):
        return lora_experts(x, A, B, ids, weights, base_TO=base, backend=BACKEND)

    first, second = run(function, t), run(function, t)
    for name in first:
        assert torch.equal(first[name], second[name]), name


class Planted:
    """A kernel whose launcher gets one wrong argument."""

    def __init__(self, kernel, change):
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid):
        return lambda *args, **options: self.kernel[grid](*self.change(list(args)), **options)


def swapped(index, value):
    def change(args):
        args[index] = value(args[index]) if callable(value) else value
        return args

    return change


@pytest.mark.parametrize(
    ("kernel", "change", "how"),
    [
        # one row too few: a tail mask that is off by one leaves the last row unwritten
        ("lora_up_dense_kernel", swapped(10, lambda T: T - 1), "dense"),
        ("lora_down_dense_kernel", swapped(8, lambda T: T - 1), "dense"),
        # the last expert missing
        ("lora_up_dense_kernel", swapped(13, lambda E: E - 1), "dense"),
        # the wrong expert in a tile
        ("lora_up_sorted_kernel", swapped(6, lambda e: torch.where(e == 0, 1, e)), "sorted"),
        # a row too many at a tile border
        ("lora_up_sorted_kernel", swapped(7, lambda start: start + 1), "sorted"),
        # the rank's tail
        ("lora_down_dense_kernel", swapped(11, lambda L: L - 1), "dense"),
    ],
)
def test_planted_bugs_are_caught(kernel, change, how, monkeypatch, poison_empty):
    monkeypatch.setitem(globals(), "BACKEND", how)
    monkeypatch.setattr(launch, kernel, Planted(getattr(launch, kernel), change))
    ids, t = make("balanced")
    del t["W"], t["bias"]
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        compare(lambda how, x, A, B, weights, base: lora_experts(x, A, B, ids, weights, base_TO=base, backend=how), t)
