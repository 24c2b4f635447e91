"""`lora_down` and `lora_up` on the kernels. Run by test_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os

import pytest
import torch
from moe_kit_kernels import KernelError, lora_down, lora_experts, lora_up, topk_gate
from moe_kit_kernels.lora_experts import dispatch, launch, triton_halves
from moe_kit_kernels.route_plan import route_plan, route_plan_pairs

from tests.kernels.interpreter.cases_lora import EDGES, make, run
from tests.tolerances import assert_close

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"


@pytest.fixture(params=["dense", "mixed", "sorted"])
def order(request, monkeypatch):
    monkeypatch.setattr(triton_halves, "choose", lambda *_: request.param)
    return request.param


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    """Fail a test in which no kernel ran."""
    calls = []
    for name, right in (("down", triton_halves.down), ("up", triton_halves.up)):

        def counted(*args, function=right, **options):
            calls.append(function)
            return function(*args, **options)

        monkeypatch.setattr(triton_halves, name, counted)
    yield calls
    assert calls


def compare(function, tensors, dtype=torch.float32):
    expected, actual = (
        run(lambda **t: function("reference", **t), tensors),
        run(lambda **t: function("triton", **t), tensors),
    )
    for name, value in expected.items():
        assert_close(name, actual[name], value, dtype)


@pytest.mark.parametrize("edge", EDGES)
def test_down(edge, order, poison_empty):
    ids, t = make(edge)
    plan = route_plan(ids, t["A"].shape[0])
    compare(lambda how, x, A: lora_down(x, A, plan, backend=how), {"x": t["x"], "A": t["A"]})


@pytest.mark.parametrize("L", [8, 32])
def test_tall_tiles(L, monkeypatch, poison_empty):
    """Sorted down and dense up in tiles of 256 rows, which only large calls take: two of them here, the second with a tail."""
    monkeypatch.setattr(triton_halves, "choose", lambda *_: "mixed")
    monkeypatch.setattr(triton_halves, "down_rows", lambda *_: 256)
    tall = {"BM": 256, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3}
    monkeypatch.setattr(launch.sizes, "up_tile", lambda *_, **__: tall)
    T, E, D, O = 300, 2, 40, 70
    ids = torch.stack([torch.randint(-1, E + 1, (T,)), torch.randint(0, E, (T,))], dim=1)
    plan = route_plan(ids, E)
    tensors = {
        "x": torch.randn(T, D),
        "A": torch.randn(E, L, D) / D**0.5,
        "B": torch.randn(E, O, L) / L**0.5,
        "weights": torch.rand(T, 2),
        "base": torch.randn(T, O),
    }

    def halves(how, x, A, B, weights, base):
        return lora_up(lora_down(x, A, plan, backend=how), B, plan, weights, base_TO=base, scale=0.7, backend=how)

    compare(halves, tensors)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("base", [True, False])
def test_up(edge, base, order, poison_empty):
    ids, t = make(edge)
    plan = route_plan(ids, t["B"].shape[0])
    H = torch.randn(ids.numel(), t["B"].shape[2])
    tensors = {"H": H, "B": t["B"], "weights": t["weights"], **({"base": t["base"]} if base else {})}

    def function(how, H, B, weights, base=None):
        return lora_up(H, B, plan, weights, scale=0.7, base_TO=base, backend=how)

    compare(function, tensors)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("edge", ["balanced", "odd widths", "empty slots", "all to one, others empty"])
def test_several_stacks_and_a_change_in_between(edge, joined, order, monkeypatch, poison_empty):
    monkeypatch.setattr(triton_halves, "joins", lambda A, T: joined)
    ids, t = make(edge)
    plan = route_plan(ids, t["A"].shape[0])
    E, _, D = t["A"].shape
    tensors = {"x": t["x"], "A": t["A"], "B": t["B"], "A2": torch.randn(E, 3, D), "weights": t["weights"]}

    def function(how, x, A, B, A2, weights):
        H, H2 = lora_down(x, (A, A2), plan, backend=how)
        return lora_up(H.tanh() * H2.sum(1, keepdim=True), B, plan, weights, backend=how)

    compare(function, tensors)


def test_join_pays_where_it_saves_reads():
    A = [torch.zeros(8, 16, 64)] * 3
    assert triton_halves.joins(A, 16384)
    assert not triton_halves.joins(A, 128)
    assert not triton_halves.joins(A[:1], 16384)
    assert not triton_halves.joins([torch.zeros(8, 64, 64)] * 3, 16384)
    triton_halves.down("dense", torch.zeros(1, 64), A, route_plan(torch.zeros(1, 1, dtype=torch.long), 8))


def test_transposed_bank(order, poison_empty):
    # B kept as [E, L, O] in memory
    ids, t = make("wider than a tile")
    plan = route_plan(ids, t["B"].shape[0])
    tensors = {"H": torch.randn(ids.numel(), 16), "Bt": t["B"].transpose(1, 2).contiguous(), "weights": t["weights"]}
    compare(lambda how, H, Bt, weights: lora_up(H, Bt.transpose(1, 2), plan, weights, backend=how), tensors)


def test_half_precision_and_wide_adapters(order, poison_empty):
    for adapter in (torch.float16, torch.float32):
        ids, t = make("balanced", torch.float16)
        plan = route_plan(ids, t["A"].shape[0])
        tensors = {"x": t["x"], "A": t["A"].to(adapter), "B": t["B"].to(adapter), "weights": t["weights"]}

        def function(how, x, A, B, weights, plan=plan):
            H = lora_down(x, A, plan, backend=how)
            assert H.dtype is A.dtype
            return lora_up(H, B, plan, weights, backend=how)

        compare(function, tensors, torch.float16)


def test_what_dropped_pairs_hold_does_not_matter(order, poison_empty):
    ids, t = make("empty slots")
    plan = route_plan(ids, 2)
    dropped = (plan.expert_P == 2)[:, None]
    H = torch.randn(ids.numel(), 4)
    results = []
    for value in (0.0, float("nan")):
        held = H.masked_fill(dropped, value).requires_grad_()
        weights = t["weights"].clone().requires_grad_()
        y = lora_up(held, t["B"], plan, weights)
        y.sum().backward()
        assert not held.grad[dropped[:, 0]].any()
        results.append((y.detach(), held.grad, weights.grad))
    for first, second in zip(*results):
        assert_close("with NaN in dropped pairs", second, first)


def test_halves_equal_the_whole(order):
    ids, t = make("taller than a tile")
    plan = route_plan(ids, 3)
    H = lora_down(t["x"], t["A"], plan)
    y = lora_up(H, t["B"], plan, t["weights"], base_TO=t["base"], scale=0.7)
    whole = dispatch.run_triton(order, plan, 0.7, t["x"], t["weights"], t["base"], t["A"], t["B"])
    assert torch.equal(y, whole)


def test_what_the_kernels_cannot_do_is_said(on_the_kernels):
    pairs = route_plan_pairs(torch.tensor([0, 0, 2]), torch.tensor([1, 0, 1]), 3, 2)
    table = route_plan(torch.zeros(3, 1, dtype=torch.long), 2)
    x, A, B = torch.randn(3, 8), torch.randn(2, 4, 8), torch.randn(2, 8, 4)
    H, w = torch.randn(3, 4), torch.rand(3)

    def calls(plan, dtype):
        x_, A_, B_, H_ = (t.to(dtype) for t in (x, A, B, H))
        yield lambda how: lora_down(x_, A_, plan, backend=how)
        yield lambda how: lora_up(H_, B_, plan, w, backend=how)
        yield lambda how: lora_experts(x_, A_, B_, None, w, plan=plan, backend=how)

    for plan, dtype, message in ((pairs, torch.float32, "free pairs"), (table, torch.float64, "float64")):
        for call in calls(plan, dtype):
            with pytest.raises(KernelError, match=f'{message}.*Pass backend="auto", which runs plain PyTorch'):
                call("triton")
            assert_close("auto", call("auto"), call("reference"), dtype)
    assert not on_the_kernels
    on_the_kernels.append(None)


def test_a_trace_of_the_kernels_alone_is_refused(on_the_kernels, monkeypatch):
    ids, t = make("balanced")
    plan = route_plan(ids, 4)
    H = torch.zeros(ids.numel(), 8)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for call in (
        lambda: lora_down(t["x"], t["A"], plan, backend="triton"),
        lambda: lora_up(H, t["B"], plan, t["weights"], backend="triton"),
        lambda: topk_gate(torch.zeros(2, 4), 2, backend="triton"),
    ):
        with pytest.raises(KernelError, match=r"inside torch\.compile|or torch\.compile"):
            call()
    assert not on_the_kernels
    on_the_kernels.append(None)


def test_dense_is_the_dense_order(monkeypatch):
    orders = []
    for name in ("down", "up"):
        right = getattr(triton_halves, name)
        monkeypatch.setattr(
            triton_halves, name, lambda how, *a, right=right, **k: orders.append(how) or right(how, *a, **k)
        )
    monkeypatch.setattr(triton_halves, "choose", lambda *_: "sorted")
    ids, t = make("balanced")
    plan = route_plan(ids, 4)
    lora_up(lora_down(t["x"], t["A"], plan, backend="dense"), t["B"], plan, t["weights"], backend="dense")
    assert orders == ["dense", "dense"]


def test_the_operator_of_a_trace_runs_on_the_kernels(order, on_the_kernels, poison_empty):
    ids, t = make("empty slots")
    tensors = {name: t[name] for name in ("x", "A", "B", "weights", "base")}

    def eager(x, A, B, weights, base):
        return lora_experts(x, A, B, ids, weights, base_TO=base, scale=0.7, backend="reference")

    def traced(x, A, B, weights, base):
        return lora_experts(x, A, B, ids, weights, base_TO=base, scale=0.7)

    expected, actual = run(eager, tensors), run(torch.compile(traced, fullgraph=True, backend="aot_eager"), tensors)
    for name, value in expected.items():
        assert_close(name, actual[name], value)
    # down and up forward, up (of dx) backward
    assert len(on_the_kernels) >= 3
    leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
    x, A, B, weights, base = leaves
    torch.library.opcheck(torch.ops.moe_kit.lora_experts, (x, A, B, ids, None, weights, base, 0.7, "auto"))


def test_free_pairs_run_in_plain_pytorch(on_the_kernels, monkeypatch):
    plan = route_plan_pairs(torch.tensor([0, 0, 2]), torch.tensor([1, 0, 1]), 3, 2)
    x, A = torch.randn(3, 8), torch.randn(2, 4, 8)
    assert_close("H", lora_down(x, A, plan), lora_down(x, A, plan, backend="reference"))
    assert not on_the_kernels
    on_the_kernels.append(None)


@pytest.mark.parametrize(
    ("kernel", "index"), [("lora_down_dense_kernel", 8), ("lora_down_dense_kernel", 11), ("lora_up_dense_kernel", 10)]
)
def test_planted_bugs_are_caught(kernel, index, monkeypatch, poison_empty):
    # a row or a rank too few
    monkeypatch.setattr(triton_halves, "choose", lambda *_: "dense")
    right = getattr(launch, kernel)

    class Wrong:
        def __getitem__(self, grid):
            return lambda *args, **options: right[grid](*args[:index], args[index] - 1, *args[index + 1 :], **options)

    monkeypatch.setattr(launch, kernel, Wrong())
    ids, t = make("balanced")
    plan = route_plan(ids, 4)

    def function(how, x, A, B, weights):
        return lora_up(lora_down(x, A, plan, backend=how), B, plan, weights, backend=how)

    with pytest.raises(AssertionError):
        compare(function, {name: t[name] for name in ("x", "A", "B", "weights")})
