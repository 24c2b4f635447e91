"""Every CPU implementation of lora_experts equals the reference, outputs and every gradient."""

from unittest import mock

import pytest
import torch
from moe_kit_kernels import (
    KernelError,
    lora_down,
    lora_experts,
    lora_linear_group,
    lora_up,
    route_plan,
    route_plan_pairs,
)
from moe_kit_kernels.lora_experts import cpu_sorted, dispatch

from tests.kernels.lora_cases import CASES, compare, make, run
from tests.tolerances import assert_close


def check_experts(x, A, B, base, ids, weights, backend="dense", **more):
    def call(which):
        def function(x, A, B, weights, base=None):
            return lora_experts(x, A, B, ids, weights, base_TO=base, scale=0.7, backend=which, **more)

        return function

    # few columns are left to autograd, many have a gradient by hand
    for few in (dispatch._FEW_COLUMNS, 0):
        with mock.patch.object(dispatch, "_FEW_COLUMNS", few):
            inputs = {"x": x, "A": A, "B": B, "weights": weights, "base": base}
            compare(call(backend), call("reference"), inputs)
            del inputs["base"]
            compare(call(backend), call("reference"), inputs)


@pytest.mark.parametrize("backend", ["dense", "sorted", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, backend, poison_empty):
    check_experts(*make(**CASES[case]), backend=backend)


@pytest.mark.parametrize("case", CASES)
def test_sorted_by_grouped_products(case, poison_empty):
    # float32 and widths of 16 bytes take the other walk over the experts
    sizes = CASES[case] | {"D": 24, "O": 40, "L": 4}
    x, A, B, base, ids, weights = make(**sizes, dtype=torch.float32)
    assert cpu_sorted.can_group(24, 40, 4, torch.float32)
    check_experts(x, A, B, base, ids, weights, backend="sorted")


@pytest.mark.parametrize("case", CASES)
def test_decode_equals_reference(case):
    x, A, B, base, ids, weights = make(**CASES[case])
    ids = torch.where(torch.rand(ids.shape) < 0.2, -1, ids)
    with torch.no_grad():
        for b in (None, base):
            args = (x, A, B, ids, weights)
            y = lora_experts(*args, base_TO=b, backend="decode", scale=0.5)
            assert_close("y", y, lora_experts(*args, base_TO=b, backend="reference", scale=0.5))
            planned = lora_experts(
                x, A, B, None, weights, plan=route_plan(ids, A.shape[0]), base_TO=b, backend="decode", scale=0.5
            )
            assert_close("y", planned, y)
        fresh = base.clone()
        assert lora_experts(*args, base_TO=fresh, overwrite_base=True, backend="decode") is fresh


IDS = [
    None,
    [[0, -1], [-1, -1], [2, 1], [3, 9]],
    [[1, 1], [2, 2], [0, 1], [1, 1]],
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_dense_without_a_graph_equals_reference(case, ids, kind, monkeypatch):
    # a table takes a straight line, unless there are empty slots, which go through a plan
    x, A, B, base, ids, weights = make(**CASES[case]) if ids is None else make(4, 3, 2, 6, 5, 2, ids=torch.tensor(ids))
    for straight in (True, False):
        if not straight:
            monkeypatch.setattr(dispatch, "gates_of_table", lambda *_: None)
        with torch.no_grad():
            for b in (None, base):
                args = (x, A, B, ids.to(kind), weights)
                y = lora_experts(*args, base_TO=b, backend="dense", scale=0.5)
                assert_close("y", y, lora_experts(*args, base_TO=b, backend="reference", scale=0.5))
                # a bank that keeps B as [E, L, O] is not copied
                args = (x, A, B.transpose(1, 2).contiguous().transpose(1, 2), ids.to(kind), weights)
                assert_close("y", lora_experts(*args, base_TO=b, backend="dense", scale=0.5), y)
            fresh = base.clone()
            assert lora_experts(*args, base_TO=fresh, overwrite_base=True, backend="dense") is fresh
            w = torch.randn(B.shape[1], x.shape[1], dtype=x.dtype)
            (y,) = lora_linear_group(x, [w], [None], [A], [B], ids.to(kind), weights, scale=0.5, backend="dense")
            expected = lora_experts(x, A, B, ids, weights, base_TO=x @ w.t(), scale=0.5, backend="reference")
            assert_close("y", y, expected)
            if ids.numel():
                with pytest.raises(KernelError, match="-1 or more"):
                    lora_experts(x, A, B, ids - 9, weights, backend="dense")


@pytest.mark.parametrize(
    "ids",
    [
        [[0, -1], [-1, -1], [2, 1], [3, 9]],  # empty slots and ids past the bank
        [[-1, -1]] * 4,  # nothing chosen
        [[1, 1], [2, 2], [0, 1], [1, 1]],  # one expert twice in a token
        [[2, 2]] * 4,  # all to one, the others empty
    ],
)
@pytest.mark.parametrize("backend", ["dense", "sorted"])
def test_ids_that_are_not_usual(ids, backend, poison_empty):
    x, A, B, base, ids, weights = make(4, 3, 2, 6, 5, 2, ids=torch.tensor(ids))
    check_experts(x, A, B, base, ids, weights, backend=backend)


def test_every_expert_without_ids(poison_empty):
    x, A, B, base, _ids, _ = make(6, 4, 4, 8, 12, 2)
    weights = torch.rand(6, 4, dtype=torch.float64)
    check_experts(x, A, B, base, None, weights)


def test_pairs(poison_empty):
    x, A, B, base, _, _ = make(7, 3, 1, 6, 5, 2)
    token_P, expert_P = torch.tensor([3, 0, 3, 6, 2, 9, 3]), torch.tensor([1, 0, 2, -1, 0, 1, 1])
    plan = route_plan_pairs(token_P, expert_P, 7, 3)
    for backend in ("dense", "sorted"):
        check_experts(x, A, B, base, None, torch.rand(7, dtype=torch.float64), plan=plan, backend=backend)


def test_non_contiguous(poison_empty):
    x, A, B, _base, ids, weights = make(12, 4, 2, 8, 10, 4)
    x = x.detach().T.contiguous().T
    A, B = A.detach().transpose(1, 2).contiguous().transpose(1, 2), B.detach().flip(0)[::1]
    wide = torch.randn(12, 20, dtype=torch.float64)[:, ::2]

    def call(which):
        return lambda x, A, B, weights, base: lora_experts(
            x.T.contiguous().T,
            A.transpose(1, 2).contiguous().transpose(1, 2),
            B,
            ids,
            weights,
            base_TO=base,
            backend=which,
        )

    compare(call("dense"), call("reference"), {"x": x, "A": A, "B": B, "weights": weights, "base": wide})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_against_double(dtype):
    x, A, B, base, ids, weights = make(**CASES["usual"], dtype=torch.float64)
    low = {"x": x.to(dtype), "A": A.to(dtype), "B": B.to(dtype), "base": base.to(dtype), "weights": weights.float()}
    high = {n: t.double() for n, t in low.items()}
    _, grads = run(lambda x, A, B, weights, base: lora_experts(x, A, B, ids, weights, base_TO=base), low)
    ys, expected = run(
        lambda x, A, B, weights, base: lora_experts(x, A, B, ids, weights, base_TO=base, backend="reference"), high
    )
    with torch.no_grad():
        y = lora_experts(low["x"], low["A"], low["B"], ids, low["weights"], base_TO=low["base"])
    assert y.dtype == dtype
    assert_close("y", y, ys[0], dtype)
    for name in low:
        assert grads[name].dtype == low[name].dtype
        assert_close(f"d{name}", grads[name], expected[name], dtype)


def test_wide_adapters_on_a_half_precision_base():
    x, A, B, base, ids, weights = make(**CASES["usual"], dtype=torch.float32)
    inputs = {"x": x.bfloat16(), "A": A, "B": B, "weights": weights, "base": base.bfloat16()}

    def call(which):
        return lambda x, A, B, weights, base: lora_experts(x, A, B, ids, weights, base_TO=base, backend=which)

    # one rounding to bfloat16 at the end; the gradients of A, B and the weights are exact in float32
    ys, grads = run(call("dense"), inputs)
    expected_ys, expected = run(call("reference"), inputs)
    assert ys[0].dtype == torch.bfloat16
    assert_close("y", ys[0], expected_ys[0], torch.bfloat16)
    for name in ("A", "B", "weights"):
        assert_close(f"d{name}", grads[name], expected[name], torch.float32)


def test_up_ignores_what_dropped_pairs_hold(poison_empty):
    ids = torch.tensor([[0, -1], [1, 1], [3, 9]])
    plan = route_plan(ids, 4)
    H, B, weights = torch.randn(6, 2), torch.randn(4, 5, 2), torch.rand(3, 2)
    inputs = {"H": H.double(), "B": B.double(), "weights": weights.double()}

    def call(which):
        return lambda H, B, weights: lora_up(H, B, plan, weights, scale=0.5, backend=which)

    compare(call("dense"), call("reference"), inputs)


def test_halves_equal_reference(poison_empty):
    x, A, B, base, _, _ = make(**CASES["usual"])
    ids = torch.tensor([[0, -1], [1, 1], [3, 9]] * 13)[:37]
    plan = route_plan(ids, 8)
    weights = torch.rand(37, 2, dtype=torch.float64)

    def call(which):
        def function(x, A, A2, B, weights, base):
            H, H2 = lora_down(x, (A, A2), plan, backend=which)
            y = lora_up(H.tanh(), B, plan, weights, base_TO=base, scale=0.5, backend=which)
            return y, lora_up(H2, B, plan, weights, backend=which)

        return function

    A2 = torch.randn_like(A)
    compare(call("dense"), call("reference"), {"x": x, "A": A, "A2": A2, "B": B, "weights": weights, "base": base})


def test_base_is_kept_unless_given_away():
    x, A, B, base, ids, weights = make(**CASES["usual"])
    before = base.detach().clone()
    y = lora_experts(x, A, B, ids, weights, base_TO=base)
    assert torch.equal(base, before)
    fresh = base * 1.0
    written = lora_experts(x, A, B, ids, weights, base_TO=fresh, overwrite_base=True)
    assert written.data_ptr() == fresh.data_ptr()
    assert_close("y", written, y)
    written.sum().backward()
    assert_close("dbase", base.grad, torch.ones_like(base))


def test_bad_input():
    x, A, B, base, ids, weights = make(**CASES["usual"])
    with pytest.raises(KernelError, match="-2"):
        lora_experts(x, A, B, ids - 2 - ids.min(), weights)
    with pytest.raises(KernelError, match="backend"):
        lora_experts(x, A, B, ids, weights, backend="fast")
    with pytest.raises(KernelError, match=r'CUDA device.*"auto", which runs "cpu" here'):
        lora_experts(x, A, B, ids, weights, backend="triton")
    plan = route_plan(ids, A.shape[0])
    H = torch.zeros(ids.numel(), A.shape[1])
    for half in (lambda how: lora_down(x, A, plan, backend=how), lambda how: lora_up(H, B, plan, weights, backend=how)):
        with pytest.raises(KernelError, match=r'CUDA device.*"auto", which runs "cpu" here'):
            half("triton")
        with pytest.raises(KernelError, match="one of auto, dense, triton, reference"):
            half("sorted")
    with pytest.raises(KernelError, match="gradient"):
        lora_experts(x, A, B, ids, weights, backend="decode")
    with pytest.raises(KernelError, match="A_ELD"):
        lora_experts(x, A[:, :, :3], B, ids, weights)
    with pytest.raises(KernelError, match="dtype of x_TD"):
        lora_experts(x.long(), A, B, ids, weights)
    with pytest.raises(KernelError, match="weights"):
        lora_experts(x, A, B, ids, weights[:, :1])
    with pytest.raises(KernelError, match="base_TO"):
        lora_experts(x, A, B, ids, weights, base_TO=base[:, :2])
    with pytest.raises(KernelError, match="device"):
        lora_experts(x, A.to("meta"), B, ids, weights)
    with pytest.raises(KernelError, match="plan"):
        lora_experts(x, A, B, None, weights, plan=route_plan(ids, 9))
    with pytest.raises(KernelError, match="group"):
        lora_linear_group(x, [], [], [], [], ids, weights)


@pytest.mark.parametrize("kind", ["table", "pairs", "every expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("L", [4, 3])
@pytest.mark.parametrize("backend", ["dense", "sorted"])
def test_saved_tensors_are_the_promised_ones(backend, L, dtype, kind):
    T, E, K = 64, 8, 2
    x, A, B, base, ids, weights = make(T=T, E=E, K=K, D=24, O=40, L=L, dtype=dtype)
    plan, pairs = route_plan(ids, E), T * K
    if kind == "pairs":
        pairs = 50
        plan = route_plan_pairs(torch.randint(0, T, (50,)), torch.randint(0, E, (50,)), T, E)
        weights = torch.rand(50, requires_grad=True)
    elif kind == "every expert":
        plan, pairs, weights = None, T * E, torch.rand(T, E, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_experts(x, A, B, None, weights, plan=plan, base_TO=base, backend=backend)
    own = sorted(t.untyped_storage().data_ptr() for t in (x, A, B, weights))
    assert sorted(t.untyped_storage().data_ptr() for t in saved if t.untyped_storage().data_ptr() in own) == own
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    # H [P, L] alone; every expert's H is one matrix [T, E*L]
    assert [t.numel() for t in extra] == [pairs * L], [tuple(t.shape) for t in extra]
    assert extra[0].dtype is dtype
    assert extra[0].untyped_storage().nbytes() == pairs * L * dtype.itemsize, "a view keeps all of its memory"
