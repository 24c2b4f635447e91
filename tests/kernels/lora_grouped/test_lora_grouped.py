import pytest
import torch
from moe_kit_kernels import KernelError, lora_grouped, route_plan

from tests.tolerances import assert_close

EDGES = {
    "balanced": ([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2]], 4),
    "empty experts": ([[6, 0], [6, 0], [0, 6]], 9),
    "no token": ([], 3),
    "empty slots": ([[0, -1], [-1, -1], [5, 1], [1, 7]], 2),
    "all to one": ([[1]] * 30, 3),
}
D, O, L = 6, 8, 3


def case(rows, E, gather, dtype=torch.float64):
    ids = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 2)
    tensors = {
        "x": torch.randn(ids.shape[0] if gather else ids.numel(), D, dtype=dtype),
        "weight_EOD": torch.randn(E, O, D, dtype=dtype),
        "A_ELD": torch.randn(E, L, D, dtype=dtype),
        "B_EOL": torch.randn(E, O, L, dtype=dtype),
    }
    return ids, tensors


def naive(t, ids, gather, scatter, scale):
    """Merged weights, one pair at a time, written without any of the package's parts."""
    E, K = t["weight_EOD"].shape[0], ids.shape[1]
    merged = t["weight_EOD"] + scale * t["B_EOL"] @ t["A_ELD"]
    flat = ids.reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda p: flat[p] if 0 <= flat[p] < E else E)
    rows = {}
    for position, p in enumerate(order):
        row = t["x"][p // K] if gather else t["x"][position]
        rows[p] = merged[flat[p]] @ row if 0 <= flat[p] < E else torch.zeros(O, dtype=row.dtype)
    result = [rows[p] for p in (range(len(flat)) if scatter else order)]
    return torch.stack(result) if result else t["x"].new_zeros(0, O) + 0 * t["x"].sum()


def run(function, tensors, upstream):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y = function(leaves)
    if y.requires_grad:
        y.backward(upstream)
    return {"y": y, **{n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}}


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_merged_weights(edge, gather, scatter, backend, poison_empty):
    rows, E = EDGES[edge]
    ids, t = case(rows, E, gather)
    upstream = torch.randn(ids.numel(), O, dtype=torch.float64)
    options = {"plan": route_plan(ids, E), "gather": gather, "scatter": scatter, "scale": 0.7, "backend": backend}
    expected = run(lambda t: naive(t, ids, gather, scatter, 0.7), t, upstream)
    actual = run(lambda t: lora_grouped(**t, **options), t, upstream)
    for name, value in expected.items():
        assert_close(name, actual[name], value)


def test_gradcheck():
    ids, t = case([[0, 2], [2, -1], [1, 0]], 3, True)
    plan = route_plan(ids, 3)
    leaves = [v.requires_grad_() for v in t.values()]
    assert torch.autograd.gradcheck(lambda *v: lora_grouped(*v, plan, gather=True, scatter=True, scale=2.0), leaves)


def test_wide_adapters_on_a_narrow_base():
    ids, t = case(EDGES["balanced"][0], 4, True, torch.float32)
    plan = route_plan(ids, 4)
    low = {**t, "x": t["x"].bfloat16(), "weight_EOD": t["weight_EOD"].bfloat16()}
    low["A_ELD"].requires_grad_()
    y = lora_grouped(**low, plan=plan, gather=True)
    y.sum().backward()
    assert y.dtype is torch.bfloat16
    assert low["A_ELD"].grad.dtype is torch.float32
    assert_close("y", y, lora_grouped(**t, plan=plan, gather=True), torch.bfloat16)


def test_saves_nothing_of_the_size_of_the_stack():
    ids, t = case([[0, 1]] * 40, 2, True, torch.float32)
    own = {v.untyped_storage().data_ptr() for v in t.values()}
    t["A_ELD"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        lora_grouped(**t, plan=route_plan(ids, 2), gather=True)
    assert [tuple(s.shape) for s in saved if s.untyped_storage().data_ptr() not in own] == [(80, L)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(3, 4)}, "shape of x"),
        ({"A_ELD": torch.zeros(3, 2, 5)}, "A_ELD"),
        ({"B_EOL": torch.zeros(3, O, 4)}, "B_EOL"),
        ({"weight_EOD": torch.zeros(2, O, D)}, "num_experts"),
        ({"B_EOL": torch.zeros(3, O, L, dtype=torch.int64)}, "floating-point"),
        ({"backend": "triton"}, "CUDA device"),
    ],
)
def test_errors_say_what_is_wrong(change, match):
    ids, t = case([[0, 1], [2, 1]], 3, True, torch.float32)
    with pytest.raises(KernelError, match=match):
        lora_grouped(**{**t, "plan": route_plan(ids, 3), "gather": True, **change})


@pytest.mark.parametrize("scatter", [True, False])
def test_compiles_as_one_graph(scatter):
    ids, t = case(EDGES["empty slots"][0], 2, True)
    upstream = torch.randn(ids.numel(), O, dtype=torch.float64)
    expected = run(lambda t: naive(t, ids, True, scatter, 0.7), t, upstream)

    def function(t):
        return lora_grouped(**t, plan=route_plan(ids, 2), gather=True, scatter=scatter, scale=0.7)

    actual = run(torch.compile(function, fullgraph=True, backend="aot_eager"), t, upstream)
    for name, value in expected.items():
        assert_close(name, actual[name], value)
