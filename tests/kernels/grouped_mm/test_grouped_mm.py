import pytest
import torch
from moe_kit_kernels import KernelError, grouped_mm, route_plan

from tests.tolerances import assert_close

EDGES = {
    "balanced": ([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2]], 4),
    "empty experts": ([[6, 0], [6, 0], [0, 6]], 9),
    "no token": ([], 3),
    "empty slots": ([[0, -1], [-1, -1], [5, 1], [1, 7]], 2),
    "nothing chosen": ([[-1, -1]], 2),
    "around the swapped GEMM": ([[0]] * 9 + [[1]] * 8 + [[2]] * 48 + [[3]] * 49, 4),
}
OPTIONS = {
    "plain": {},
    "bias and gate": {"bias": True, "weights": True},
    "activation": {"activation": "gelu", "bias": True},
    "gated": {"activation": "silu", "gated": True, "weights": True, "residual": True},
    "residual": {"residual": True},
}
D, O = 6, 8


def ids_of(rows):
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 2)


def naive(t, ids, gather, scatter, activation=None, gated=False):
    """Loop over pairs, experts in ascending order, without any of the package's parts."""
    E = t["weight_EOD"].shape[0]
    T, K = ids.shape
    flat = ids.reshape(-1).tolist()
    order = sorted(range(T * K), key=lambda p: flat[p] if 0 <= flat[p] < E else E)
    act = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu, None: lambda z: z}[activation]
    width = O // 2 if gated else O
    rows = {}
    for position, p in enumerate(order):
        row = t["x"][p // K] if gather else t["x"][position]
        e = flat[p]
        if not 0 <= e < E:
            rows[p] = torch.zeros(width, dtype=row.dtype)
            continue
        z = t["weight_EOD"][e] @ row
        if t["bias_EO"] is not None:
            z = z + t["bias_EO"][e]
        z = act(z[: O // 2]) * z[O // 2 :] if gated else act(z)
        rows[p] = z if t["weights"] is None else t["weights"].reshape(-1)[p] * z
    result = [rows[p] for p in (range(T * K) if scatter else order)]
    y = torch.stack(result) if result else t["x"].new_zeros(0, width) + 0 * t["x"].sum()
    return y if t["residual"] is None else y + t["residual"]


def run(function, tensors, upstream):
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
    y = function(leaves)
    if y.requires_grad:
        y.backward(upstream)
    grads = {
        name: None if t is None else torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()
    }
    return {"y": y, **grads}


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_a_loop_over_pairs(edge, option, gather, scatter, backend, poison_empty):
    rows, E = EDGES[edge]
    ids = ids_of(rows)
    P = ids.numel()
    options = dict(OPTIONS[option])
    width = O // 2 if options.get("gated") else O
    t = {
        "x": torch.randn(ids.shape[0] if gather else P, D, dtype=torch.float64),
        "weight_EOD": torch.randn(E, O, D, dtype=torch.float64),
        "bias_EO": torch.randn(E, O, dtype=torch.float64) if options.pop("bias", False) else None,
        "weights": torch.rand(ids.shape, dtype=torch.float64) if options.pop("weights", False) else None,
        "residual": torch.randn(P, width, dtype=torch.float64) if options.pop("residual", False) else None,
    }
    plan = route_plan(ids, E)
    upstream = torch.randn(P, width, dtype=torch.float64)
    expected = run(lambda t: naive(t, ids, gather, scatter, **options), t, upstream)
    actual = run(
        lambda t: grouped_mm(**t, plan=plan, gather=gather, scatter=scatter, backend=backend, **options), t, upstream
    )
    for name, value in expected.items():
        if value is not None:
            assert_close(name, actual[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_and_dtypes(dtype):
    ids = torch.cat([torch.full((n, 1), e) for e, n in enumerate((9, 8, 48, 49))])
    plan = route_plan(ids, 4)
    x, weight = torch.randn(114, 24).to(dtype), torch.randn(4, 16, 24).to(dtype)
    y = grouped_mm(x, weight, plan)
    assert y.dtype is dtype
    assert_close("y", y, grouped_mm(x.double(), weight.double(), plan, backend="reference"), dtype)
    assert grouped_mm(x.float(), weight, plan).dtype is torch.float32


def test_gradcheck():
    plan = route_plan(ids_of([[0, 2], [2, -1], [1, 0]]), 3)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    options = {"gather": True, "scatter": True, "activation": "silu", "gated": True}
    assert torch.autograd.gradcheck(lambda x, w, g: grouped_mm(x, w, plan, weights=g, **options), (x, weight, gates))


def test_sorted_rows_chain_without_a_reorder():
    ids = ids_of([[0, 1], [2, 1], [1, 0]])
    plan = route_plan(ids, 3)
    x, up, down = torch.randn(3, 4), torch.randn(3, 5, 4), torch.randn(3, 4, 5)
    y = grouped_mm(grouped_mm(x, up, plan, gather=True), down, plan, scatter=True).view(3, 2, 4)
    expected = torch.stack([torch.stack([down[e] @ up[e] @ x[t] for e in ids[t]]) for t in range(3)])
    assert_close("y", y, expected)


def test_does_not_save_pre_activations_without_need():
    plan = route_plan(ids_of([[0, 1], [2, 1]]), 3)
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(tuple(s.shape)) or s, lambda s: s):
        grouped_mm(x, weight, plan, gather=True)
    assert sorted(saved) == [(2, 4), (3, 5, 4)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(3, 4)}, "shape of x"),
        ({"x": torch.zeros(4, 4).long()}, "floating-point"),
        ({"weight_EOD": torch.zeros(2, 6, 4)}, "num_experts"),
        ({"bias_EO": torch.zeros(3, 5)}, "bias_EO"),
        ({"weights": torch.zeros(3)}, "3 values"),
        ({"activation": "tanh"}, "'tanh'"),
        ({"gated": True}, "an activation"),
        ({"residual": torch.zeros(4, 4)}, "residual"),
        ({"backend": "triton"}, "CUDA device"),
        ({"backend": "sorted"}, "'sorted'"),
        ({"bias_EO": torch.zeros(3, 6, device="meta")}, "device of bias_EO"),
    ],
)
def test_errors_say_what_is_wrong(change, match):
    plan = route_plan(ids_of([[0, 1], [2, 1]]), 3)
    arguments = {"x": torch.zeros(4, 4), "weight_EOD": torch.zeros(3, 6, 4), "plan": plan, **change}
    with pytest.raises(KernelError, match=match):
        grouped_mm(**arguments)


@pytest.mark.parametrize("option", OPTIONS)
def test_compiles_as_one_graph(option):
    ids = ids_of([[0, 1], [2, -1], [1, 2]])
    options = dict(OPTIONS[option])
    width = O // 2 if options.get("gated") else O
    t = {
        "x": torch.randn(3, D, dtype=torch.float64),
        "weight_EOD": torch.randn(3, O, D, dtype=torch.float64),
        "bias_EO": torch.randn(3, O, dtype=torch.float64) if options.pop("bias", False) else None,
        "weights": torch.rand(3, 2, dtype=torch.float64) if options.pop("weights", False) else None,
        "residual": torch.randn(6, width, dtype=torch.float64) if options.pop("residual", False) else None,
    }
    upstream = torch.randn(6, width, dtype=torch.float64)
    expected = run(lambda t: naive(t, ids, True, True, **options), t, upstream)

    def function(t):
        return grouped_mm(**t, plan=route_plan(ids, 3), gather=True, scatter=True, **options)

    actual = run(torch.compile(function, fullgraph=True, backend="aot_eager"), t, upstream)
    for name, value in expected.items():
        if value is not None:
            assert_close(name, actual[name], value)


def test_custom_operator_keeps_its_promises():
    from moe_kit_kernels.grouped_mm.ops import grouped_mm_op

    plan = route_plan(ids_of([[0, 1], [2, 1]]), 3)
    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((2, D), (3, O, D), (3, O)))
    weights_P, residual = torch.rand(4, requires_grad=True), torch.randn(4, O // 2, requires_grad=True)
    options = (plan.token_P, plan.expert_P, 2, 2, True, False, "silu", True, "cpu")
    torch.library.opcheck(grouped_mm_op, (x, weight, bias, weights_P, residual, *options))
