"""The dense implementation of lora_experts and lora_linear equals the reference, outputs and every gradient."""

import pytest
import torch
from moe_kit_kernels import KernelError, lora_down, lora_experts, lora_up, route_plan, route_plan_pairs
from moe_kit_kernels.lora_experts import cpu_sorted
from moe_kit_kernels.lora_linear import lora_linear, lora_linear_group

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


def check_experts(x, A, B, base, ids, weights, backend="dense", **more):
    def call(which):
        def function(x, A, B, weights, base=None):
            return lora_experts(x, A, B, ids, weights, base_TO=base, scale=0.7, backend=which, **more)

        return function

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


def test_frozen_weight_changed_between_forward_and_backward_raises():
    x, A, B, _, ids, weights = make(**CASES["usual"])
    W = torch.randn(40, 24, dtype=torch.float64)
    y = lora_linear(x, W, None, A, B, ids, weights)
    W.mul_(2)
    with pytest.raises(KernelError, match="changed in"):
        y.sum().backward()


def test_bad_input():
    x, A, B, base, ids, weights = make(**CASES["usual"])
    with pytest.raises(KernelError, match="-2"):
        lora_experts(x, A, B, ids - 2 - ids.min(), weights)
    with pytest.raises(KernelError, match="backend"):
        lora_experts(x, A, B, ids, weights, backend="fast")
    with pytest.raises(KernelError, match='CUDA device.*"auto", which runs "cpu" here'):
        lora_experts(x, A, B, ids, weights, backend="triton")
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
