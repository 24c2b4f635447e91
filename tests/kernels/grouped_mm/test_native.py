"""The grouped operators in C++ equal their references, whatever the layout, the number of threads and the vector width."""

import pytest
import torch
from moe_kit_kernels import KernelError, experts_mlp, grouped_mm, lora_grouped, route_plan, route_plan_pairs
from moe_kit_kernels.grouped_mm import native
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.compiled import only_where_it_runs, other_vector_widths, plant, run_for
from tests.kernels.experts_cases import EDGES, GRADIENTS, case, compare, ids_of, run
from tests.tolerances import assert_close

pytestmark = only_where_it_runs(native.NATIVE)


def random_ids(T, K, E):
    return torch.rand(T, E).topk(K).indices


# (ids, E, D, H) on both sides of whole registers, chunks of columns, depths and heights of tiles
WIDE = {
    "whole": lambda: (random_ids(40, 2, 4), 4, 128, 64),
    "tails": lambda: (random_ids(33, 2, 3), 3, 67, 77),
    "deep": lambda: (random_ids(25, 2, 4), 4, 600, 530),
    "narrow": lambda: (random_ids(9, 2, 3), 3, 3, 1),
    "a hot expert": lambda: (torch.cat([torch.zeros(700, 1), torch.ones(3, 1)]).long(), 2, 17, 9),
    "more rows than a tile": lambda: (random_ids(150, 1, 1), 1, 40, 130),
    "512 experts": lambda: (torch.randint(512, (40, 4)), 512, 8, 4),
}
LAYOUTS = {"by output": lambda t: t, "by input": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)}


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """One thread, or three however little work there is."""
    monkeypatch.setattr(native, "threads_for", lambda work: request.param)


def check_experts(ids, E, D, H, *, gated=True, bias=False, layout="by output", activation="silu", **more):
    t = case(ids, E, D=D, H=H, gated=gated, bias=bias, dtype=torch.float32)
    arguments = {"expert_ids_TK": ids, "activation": activation} | more
    upstream = torch.randn(ids.shape[0], D)

    def laid(t):
        return t | {name: LAYOUTS[layout](t[name]) for name in ("up_EFD", "down_EDH")}

    expected = run(
        lambda t: experts_mlp(**t, **arguments, backend="reference"),
        {name: None if v is None else v.double() for name, v in t.items()},
        upstream,
    )
    compare(
        run(lambda t: experts_mlp(**laid(t), **arguments, backend="native"), t, upstream), expected, t, t["x_TD"].dtype
    )
    with torch.no_grad():
        assert_close("y", experts_mlp(**laid(t), **arguments, backend="native"), expected["y"], torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide", WIDE)
def test_experts(wide, bias, layout, threads, poison_empty):
    check_experts(*WIDE[wide](), bias=bias, layout=layout)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, gated, threads, poison_empty):
    rows, E = EDGES[edge]
    check_experts(ids_of(rows), E, 20, 9, gated=gated, bias=True)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations(activation, gated, poison_empty):
    check_experts(*WIDE["tails"](), gated=gated, activation=activation)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_and_slopes_over_their_whole_range(activation):
    """One number in and out: the value and the derivative themselves, far into both tails."""
    z = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 100.0, -100.0, 1e10, -1e10])])
    one = torch.ones(1, 1, 1)
    ids = torch.zeros(len(z), 1, dtype=torch.long)

    def both(backend, dtype):
        x = z.to(dtype)[:, None].requires_grad_()
        weights = torch.ones(len(z), 1, dtype=dtype)
        y = experts_mlp(x, one.to(dtype), one.to(dtype), ids, weights, activation=activation, backend=backend)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    for found, wanted in zip(both("native", torch.float32), both("reference", torch.float64), strict=True):
        # a result below 1e-35 may be any such number
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [(0, 64), (64, 0)])
def test_widths_of_zero(sizes, threads, poison_empty):
    """Nothing to sum is zero, also where a whole tile is."""
    D, O = sizes
    ids = random_ids(6, 2, 3)
    plan = route_plan(ids, 3)
    x, weight, B = torch.randn(6, D), torch.randn(3, O, D), torch.randn(3, O, 0)

    def product(backend, x, weight):
        return grouped_mm(x, weight, plan, gather=True, backend=backend)

    def adapted(backend, B):
        A = torch.randn(3, 0, D)
        return lora_grouped(x, weight, A, B, plan, gather=True, backend=backend)

    compare_operators(product, {"x": x, "weight": weight}, torch.randn(12, O))
    compare_operators(adapted, {"B": B}, torch.randn(12, O))
    check_experts(ids, 3, 64, 0)
    check_experts(ids, 3, 0, 64)


def test_equal_outputs_have_equal_bits():
    """A column gets the same bits wherever it stands in a chunk."""
    weight = torch.randn(1, 1, 67).expand(1, 71, 67).contiguous()
    ids = torch.zeros(5, 1, dtype=torch.long)
    y = grouped_mm(torch.randn(5, 67), weight, route_plan(ids, 1), gather=True, backend="native")
    assert torch.equal(y, y[:, :1].expand_as(y))


def test_nan_stays(poison_empty):
    ids = torch.tensor([[0], [0]])
    x = torch.tensor([[float("nan")] * 4, [1.0] * 4])
    y = experts_mlp(x, torch.ones(1, 4, 4), torch.ones(1, 4, 2), ids, torch.ones(2, 1), backend="native")
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_dropped_pairs_may_have_any_weight(poison_empty):
    ids = ids_of([[0, -1], [7, 1], [1, 0]])
    t = case(ids, 2, dtype=torch.float32)
    clean = t["weights_TK"].masked_fill((ids < 0) | (ids > 1), 0)
    t["weights_TK"] = clean.masked_fill((ids < 0) | (ids > 1), torch.nan)
    expected = experts_mlp(**t | {"weights_TK": clean}, expert_ids_TK=ids, backend="reference")
    assert_close("y", experts_mlp(**t, expert_ids_TK=ids, backend="native"), expected)


@pytest.mark.parametrize("kept", GRADIENTS)
def test_each_gradient_alone(kept, poison_empty):
    ids, E, D, H = WIDE["tails"]()
    t = case(ids, E, D=D, H=H, bias=True, dtype=torch.float32)
    upstream = torch.randn(ids.shape[0], D)
    found = {}
    for backend in ("native", "reference"):
        own = {name: v.clone().requires_grad_(name == kept) for name, v in t.items()}
        experts_mlp(**own, expert_ids_TK=ids, backend=backend).backward(upstream)
        found[backend] = {name: v.grad for name, v in own.items()}
    assert [name for name, grad in found["native"].items() if grad is not None] == [kept]
    assert_close(kept, found["native"][kept], found["reference"][kept])


def test_pairs(threads, poison_empty):
    token_P, expert_P = torch.tensor([3, 0, 0, 9, 2, 0, 0]), torch.tensor([1, 0, 2, 1, -1, 1, 0])
    plan = route_plan_pairs(token_P, expert_P, 4, 3)
    t = case(torch.zeros(4, 2), 3, D=20, dtype=torch.float32) | {"weights_TK": torch.rand(7)}
    upstream = torch.randn(4, 20)
    found = [
        run(lambda t, b=backend: experts_mlp(**t, expert_ids_TK=None, plan=plan, backend=b), t, upstream)
        for backend in ("native", "reference")
    ]
    compare(*found, t, torch.float32)


def grouped_tensors(ids, E, D, O, gather, gated):
    rows = ids.shape[0] if gather else ids.numel()
    return {
        "x": torch.randn(rows, D),
        "weight_EOD": torch.randn(E, O, D) / D**0.5,
        "bias_EO": torch.randn(E, O),
        "weights": torch.rand(ids.shape),
        "residual": torch.randn(ids.numel(), O // 2 if gated else O),
    }


def compare_operators(function, tensors, upstream):
    found = []
    for backend in ("native", "reference"):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y = function(backend, **leaves)
        y.backward(upstream)
        found.append({"y": y.detach(), **{name: t.grad for name, t in leaves.items()}})
    for name, expected in found[1].items():
        assert_close(name, found[0][name], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu", "gated"])
def test_grouped_mm(activation, scatter, gather, layout, threads, poison_empty):
    gated = activation == "gated"
    how = {"gather": gather, "scatter": scatter, "activation": "silu" if gated else activation, "gated": gated}
    ids = torch.cat([random_ids(30, 2, 5), torch.tensor([[-1, 2], [9, -1]])])
    plan = route_plan(ids, 5)

    def function(backend, x, weight_EOD, **more):
        return grouped_mm(x, LAYOUTS[layout](weight_EOD), plan, **more, **how, backend=backend)

    tensors = grouped_tensors(ids, 5, 35, 70, gather, gated)
    compare_operators(function, tensors, torch.randn(64, 35 if gated else 70))


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("scatter", [True, False])
def test_lora_grouped(scatter, gather, threads, poison_empty):
    ids = torch.cat([random_ids(30, 2, 5), torch.tensor([[-1, 2], [9, -1]])])
    plan = route_plan(ids, 5)
    tensors = {
        "x": torch.randn(32 if gather else 64, 35),
        "weight_EOD": torch.randn(5, 70, 35) / 6,
        "A_ELD": torch.randn(5, 3, 35) / 6,
        "B_EOL": torch.randn(5, 70, 3),
    }

    def function(backend, **t):
        return lora_grouped(**t, plan=plan, gather=gather, scatter=scatter, scale=0.7, backend=backend)

    compare_operators(function, tensors, torch.randn(64, 70))


def everything(t, ids, backend="native"):
    leaves = {name: v.clone().requires_grad_() for name, v in t.items() if v is not None}
    y = experts_mlp(**leaves, expert_ids_TK=ids, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    return [y, *torch.autograd.grad(y, list(leaves.values()), upstream)]


@pytest.mark.parametrize("wide", ["tails", "deep", "a hot expert"])
def test_the_number_of_threads_changes_no_bit(wide, monkeypatch):
    ids, E, D, H = WIDE[wide]()
    t = case(ids, E, D=D, H=H, dtype=torch.float32)
    found = []
    for count in (1, 2, 5):
        monkeypatch.setattr(native, "threads_for", lambda work, count=count: count)
        found.append(everything(t, ids))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wide", ["tails", "deep"])
def test_other_tokens_change_no_bit_of_a_token(wide, layout):
    ids, E, D, H = WIDE[wide]()
    t = case(ids, E, D=D, H=H, dtype=torch.float32)
    t |= {name: LAYOUTS[layout](t[name]) for name in ("up_EFD", "down_EDH")}
    part = slice(5, 12)
    alone = t | {"x_TD": t["x_TD"][part], "weights_TK": t["weights_TK"][part]}
    y, dx, _, _, dw = everything(t, ids)
    few = [experts_mlp(**alone, expert_ids_TK=ids[part], backend="native")]
    assert torch.equal(few[0], y[part])
    leaves = [alone[name].clone().requires_grad_() for name in ("x_TD", "weights_TK")]
    some = experts_mlp(**alone | dict(zip(("x_TD", "weights_TK"), leaves)), expert_ids_TK=ids[part], backend="native")
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))[part]
    grads = torch.autograd.grad(some, leaves, upstream)
    assert torch.equal(grads[0], dx[part])
    assert torch.equal(grads[1], dw[part])


def test_strided_rows_and_gradients_without_strides(poison_empty):
    ids, E, D, H = WIDE["tails"]()
    t = case(ids, E, D=D, H=H, dtype=torch.float32)
    strided = t | {"x_TD": t["x_TD"].t().contiguous().t(), "weights_TK": t["weights_TK"].t().contiguous().t()}
    found = []
    for tensors, backend in ((strided, "native"), (t, "reference")):
        leaves = [tensors[name].requires_grad_() for name in ("x_TD", "up_EFD", "weights_TK")]
        y = experts_mlp(**tensors, expert_ids_TK=ids, backend=backend)
        # the gradient of a sum has stride 0
        found.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for actual, expected in zip(*found, strict=True):
        assert_close("y", actual, expected)


def test_gradients_lie_as_their_stacks():
    ids, E, D, H = WIDE["tails"]()
    t = case(ids, E, D=D, H=H, dtype=torch.float32)
    for layout in LAYOUTS.values():
        stacks = [layout(t[name]).detach().requires_grad_() for name in ("up_EFD", "down_EDH")]
        y = experts_mlp(**t | dict(zip(("up_EFD", "down_EDH"), stacks)), expert_ids_TK=ids, backend="native")
        for stack, grad in zip(stacks, torch.autograd.grad(y.sum(), stacks)):
            assert grad.stride() == stack.stride()


def test_auto_takes_it_where_it_pays():
    """Through the function that runs, not through the rule that chooses."""

    def result(ids, E, D, backend):
        torch.manual_seed(1)
        return experts_mlp(**case(ids, E, D=D, H=16, dtype=torch.float32), expert_ids_TK=ids, backend=backend)

    few, many = random_ids(40, 2, 4), random_ids(1200, 2, 4)
    assert torch.equal(result(few, 4, 64, "auto"), result(few, 4, 64, "native"))
    assert torch.equal(result(many, 4, 64, "auto"), result(many, 4, 64, "cpu"))
    assert not torch.equal(result(few, 4, 64, "native"), result(few, 4, 64, "cpu")), "the two cannot be told apart"
    # a FLOP counter sees products, so plain PyTorch makes them
    with FlopCounterMode(display=False) as counter:
        result(few, 4, 64, "auto")
    assert counter.get_total_flops() >= 2 * 80 * 64 * (32 + 16)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_compiled_graph_equals_eager(backend):
    ids, E, D, H = WIDE["tails"]()
    t = case(ids, E, D=D, H=H, bias=True, dtype=torch.float32)
    upstream = torch.randn(ids.shape[0], D)

    def function(t):
        return experts_mlp(**t, expert_ids_TK=ids, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = run(compiled, t, upstream), run(function, t, upstream)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_tracer_sees_every_operation():
    ids, E, D, H = WIDE["tails"]()
    t = case(ids, E, D=D, H=H, dtype=torch.float32)
    x = t.pop("x_TD")
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: experts_mlp(x, **t, expert_ids_TK=ids), (x,), check_trace=False)
        assert_close("y", traced(2 * x), experts_mlp(2 * x, **t, expert_ids_TK=ids, backend="reference"))


def test_no_tangent_goes_lost():
    """Forward differentiation either follows the operator or is refused."""
    ids, E, D, H = WIDE["tails"]()
    t = case(ids, E, D=D, H=H, dtype=torch.float32)
    x = t.pop("x_TD")
    tangent = torch.randn_like(x)
    _, expected = torch.func.jvp(
        lambda x: experts_mlp(x, **t, expert_ids_TK=ids, backend="reference"), (x,), (tangent,)
    )
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        try:
            y = experts_mlp(dual, **t, expert_ids_TK=ids)
        except RuntimeError as error:
            assert "derivative" in str(error) or "forward" in str(error), error  # noqa: PT017
            return
        assert_close("tangent", forward_ad.unpack_dual(y).tangent, expected)


def test_refuses_what_it_does_not_take(monkeypatch):
    ids, E, D, H = WIDE["tails"]()
    t = case(ids, E, D=D, H=H)
    with pytest.raises(KernelError, match="'native' with float64 on cpu, expected float32"):
        experts_mlp(**t, expert_ids_TK=ids, backend="native")
    t = {name: None if v is None else v.float() for name, v in t.items()}
    odd = t["up_EFD"].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(KernelError, match=r"'native' with strides .*, expected stacks \[E, O, D\] or \[E, D, O\]"):
        experts_mlp(**t | {"up_EFD": odd}, expert_ids_TK=ids, backend="native")
    assert_close(
        "y",
        experts_mlp(**t | {"up_EFD": odd}, expert_ids_TK=ids),
        experts_mlp(**t, expert_ids_TK=ids, backend="reference"),
    )
    monkeypatch.setattr(native.NATIVE, "_found", (None, "no C++ compiler was found"), raising=False)
    with pytest.raises(KernelError, match=r"'native', which cannot run: no C\+\+ compiler was found"):
        experts_mlp(**t, expert_ids_TK=ids, backend="native")
    assert torch.equal(experts_mlp(**t, expert_ids_TK=ids), experts_mlp(**t, expert_ids_TK=ids, backend="cpu"))


@other_vector_widths
def test_other_vector_widths(machine, tmp_path, monkeypatch, poison_empty):
    """The branch without 512-bit registers, which runs here too."""
    run_for(machine, native.NATIVE, tmp_path, monkeypatch)
    for wide in WIDE:
        for layout in LAYOUTS:
            check_experts(*WIDE[wide](), bias=True, layout=layout)
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        check_experts(*WIDE["tails"](), activation=activation)
    test_equal_outputs_have_equal_bits()
    for layout in LAYOUTS:
        test_other_tokens_change_no_bit_of_a_token("tails", layout)


# what a hand-written kernel gets wrong: (text, what replaces it)
PLANTED = {
    "last numbers of a dot product": ("rest < end; rest++", "rest < k; rest++"),
    "depths of a dot product after the first": ("more ? *reinterpret_cast<Four*>(to) + found : found", "found"),
    "last columns by output": ("for (; c < columns; c++) dots", "for (; false;) dots"),
    "last columns by input": ("for (; c < columns; c++)\n            for", "for (; false;)\n            for"),
    "rows behind the packed group": ("if (PACK) panel += COLUMNS", "if (PACK) panel += 0"),
    "the expert of a tile": ("part.e, c, columns", "0, c, columns"),
    "tiles after the first": ("first += ROWS)", "first += PART)"),
    "parts of a hot expert": ("first < o[e + 1]; first += PART", "first < o[e] + 1; first += PART"),
    "an empty expert's gradient": ("if (begin == end) std::memset", "if (false) std::memset"),
    "pairs of a gradient after the first pass": ("width, N, first > begin", "width, N, false"),
    "rows of a gradient after the first strip": ("piece + (top + r) * N", "piece + r * N"),
    "last columns of a gradient": ("for (; c < width; c++)", "for (; false;)"),
    "weights by sorted place": ("weights[order[first + i]]", "weights[first + i]"),
    "chunks of the weights' gradient": ("c * COLUMNS < H; c++) sum", "c < 1; c++) sum"),
    "the gradient of the other half": ("h *= other, dh *= other", "h *= other"),
    "the bias of the second half": ("bias + e * N + n", "bias + e * N + c"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_seen(bug, tmp_path, monkeypatch, poison_empty):
    plant(PLANTED[bug], native.NATIVE, tmp_path, monkeypatch)

    def everything_that_is_checked():
        for wide in ("tails", "deep", "a hot expert", "more rows than a tile"):
            for layout in LAYOUTS:
                check_experts(*WIDE[wide](), bias=True, layout=layout)
        check_experts(*WIDE["whole"](), layout="by input")
        check_experts(ids_of([[6, 0], [6, 0], [0, 6]]), 9, 20, 9)

    with pytest.raises(AssertionError):
        everything_that_is_checked()
