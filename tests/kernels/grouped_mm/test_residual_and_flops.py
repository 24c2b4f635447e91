"""A residual of another dtype, gates of dropped slots, work counted: eager, compiled and under autocast alike."""

import pytest
import torch
from moe_kit_kernels import KernelError, experts_mlp, grouped_mm, lora_grouped, route_plan
from moe_kit_kernels.grouped_mm.ops import grouped_mm_backward_op, grouped_mm_op
from torch.utils.flop_counter import FlopCounterMode

from tests.tolerances import assert_close

D, O, E = 8, 16, 3
IDS = torch.tensor([[0, 1], [2, -1], [1, 2], [0, 7]])
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def tensors(dtype, residual, weight=None):
    return {
        "x": torch.randn(4, D).to(dtype).requires_grad_(),
        "weight_EOD": torch.randn(E, O, D).to(weight or dtype).requires_grad_(),
        "residual": (4 * torch.randn(8, O)).to(residual).requires_grad_(),
    }


def run(function, t):
    y = function(**t)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, torch.autograd.grad(y, tuple(t.values()), upstream)


@pytest.mark.parametrize("backend", ["cpu", "reference", "compiled"])
@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize(
    "dtypes", [(BF16, F32), (BF16, BF16), (F16, F32), (F16, BF16), (F32, BF16), (F32, F32), (F32, F64)], ids=str
)
def test_residual_of_another_dtype(dtypes, scatter, backend, poison_empty):
    dtype, wide = dtypes
    t, plan = tensors(dtype, wide), route_plan(IDS, E)
    options = {"gather": True, "scatter": scatter}

    def function(**t):
        return grouped_mm(**t, plan=route_plan(IDS, E), **options, backend="cpu" if backend == "compiled" else backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, gradients = run(compiled if backend == "compiled" else function, t)
    assert y.dtype is dtype
    how = "reference" if backend == "reference" else "cpu"
    product = grouped_mm(t["x"], t["weight_EOD"], plan, **options, backend=how)
    at_least = torch.promote_types(wide, torch.promote_types(dtype, F32))
    # rounded once after the sum: the very number
    assert torch.equal(y, (product.to(at_least) + t["residual"].to(at_least)).to(dtype))
    double = {name: value.detach().double().requires_grad_() for name, value in t.items()}
    _, expected = run(lambda **t: grouped_mm(**t, plan=plan, **options, backend="reference"), double)
    for (name, value), gradient, other in zip(t.items(), gradients, expected):
        assert gradient.dtype is value.dtype, name
        lowest = max(dtype, value.dtype, key=lambda d: torch.finfo(d).eps)
        assert_close(f"d{name}", gradient, other, lowest)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_wide_result_is_rounded_once(backend):
    # x is converted to the weight's dtype and the result back to x's: the residual takes no part in that
    t, plan = tensors(F32, F32, weight=BF16), route_plan(IDS, E)
    y, gradients = run(lambda **t: grouped_mm(**t, plan=plan, gather=True, backend=backend), t)
    product = grouped_mm(t["x"], t["weight_EOD"], plan, gather=True)
    assert y.dtype is product.dtype is F32
    assert torch.equal(y, product + t["residual"])
    assert [g.dtype for g in gradients] == [F32, BF16, F32]


@pytest.mark.parametrize("compiled", [False, True])
def test_wide_residual_under_autocast(compiled):
    t, plan = tensors(F32, F32), route_plan(IDS, E)

    def function(**t):
        with torch.autocast("cpu", BF16):
            return grouped_mm(**t, plan=plan, gather=True)

    torch._dynamo.reset()
    y, gradients = run(torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function, t)
    assert y.dtype is BF16
    low = {"x": t["x"].bfloat16(), "weight_EOD": t["weight_EOD"].bfloat16(), "residual": t["residual"]}
    expected, wanted = run(lambda **t: grouped_mm(**t, plan=plan, gather=True), low)
    assert torch.equal(y, expected)
    for gradient, other in zip(gradients, wanted):
        assert gradient.dtype is F32
        assert torch.equal(gradient, other.float())


def arguments(dtype, *, activation="", gated=False, bias=True, weights=True, residual=F32):
    plan = route_plan(IDS, E)
    wanted = [torch.randn(4, D).to(dtype), torch.randn(E, O, D).to(dtype)]
    wanted += [torch.randn(E, O).to(dtype) if bias else None, torch.rand(8) if weights else None]
    wanted += [torch.randn(8, O // 2 if gated else O).to(residual)]
    wanted = [None if t is None else t.requires_grad_() for t in wanted]
    return (*wanted, plan.token_P, plan.expert_P, 4, 2, True, True, activation, gated, "cpu")


@pytest.mark.parametrize(
    "case", [{}, {"weights": False}, {"activation": "silu", "gated": True}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, F32), (F32, BF16)], ids=str)
def test_operators_keep_their_promises(case, dtypes):
    dtype, residual = dtypes
    args = arguments(dtype, residual=residual, **case)
    torch.library.opcheck(grouped_mm_op, args)
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    dy = torch.randn(args[4].shape).to(dtype)
    for needs in ([True] * 5, [False] * 5, [True, False, True, False, True]):
        needs = [need and a is not None for need, a in zip(needs, args)]
        torch.library.opcheck(grouped_mm_backward_op, (dy, *args, needs))


def test_layouts_of_the_gradients():
    args = list(arguments(F32))
    args[0] = torch.randn(D, 4).t().requires_grad_()
    args[1] = torch.randn(E, D, O).transpose(1, 2).requires_grad_()
    args[4] = torch.randn(O, 8).t().requires_grad_()
    torch.library.opcheck(grouped_mm_op, tuple(args))


@pytest.mark.parametrize(
    ("case", "frozen", "products"),
    [
        ({"weights": False}, (), 2),  # dx, dW
        ({}, (), 3),  # the gates' gradient reads the product again
        ({}, (3,), 2),
        ({"weights": False, "activation": "silu", "gated": True}, (), 3),
        ({"weights": False}, (1,), 1),
        ({"weights": False}, (0, 1), 0),
    ],
)
def test_flops_are_those_of_the_products(case, frozen, products):
    args = list(arguments(F32, **case))
    for i in frozen:
        args[i] = args[i].detach()
    with FlopCounterMode(display=False) as counter:
        y = grouped_mm_op(*args)
    one = 2 * IDS.numel() * O * D
    assert counter.get_total_flops() == one
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == products * one


@pytest.mark.parametrize("backend", ["cpu", "reference", "compiled"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("T", [4, 400])
def test_weights_of_dropped_slots_may_be_nan(T, dtype, backend, poison_empty):
    ids, how = IDS.repeat(T // 4, 1), "cpu" if backend == "compiled" else backend
    dropped = (ids < 0) | (ids >= E)
    x, up, down = torch.randn(T, D), torch.randn(E, O, D) / D**0.5, torch.randn(E, D, O // 2) / O**0.5
    x, up, down = (t.to(dtype).requires_grad_() for t in (x, up, down))
    weights, bias = torch.rand(T, 2), torch.randn(E, D).to(dtype).requires_grad_()
    calls = {
        "experts_mlp": lambda w: experts_mlp(x, up, down, ids, w, down_bias_ED=bias, backend=how),
        "grouped_mm": lambda w: grouped_mm(x, up, route_plan(ids, E), gather=True, weights=w, backend=how),
        "scattered": lambda w: grouped_mm(
            x, up, route_plan(ids, E), gather=True, scatter=True, activation="silu", weights=w, backend=how
        ),
    }
    for name, call in calls.items():
        torch._dynamo.reset()
        function = torch.compile(call, fullgraph=True, backend="aot_eager") if backend == "compiled" else call
        results = []
        for value in (0.0, float("nan")):
            w = weights.masked_fill(dropped, value).requires_grad_()
            y = function(w)
            gradients = torch.autograd.grad(y.float().square().sum(), (x, up, w, down, bias), allow_unused=True)
            results.append((y, *(g for g in gradients if g is not None)))
        for clean, with_nan in zip(*results):
            assert_close(name, with_nan, clean)
        assert not results[1][3][dropped].any(), "a dropped slot's weight has no gradient"


def test_plans_on_another_device():
    x, weight, w = torch.randn(4, D), torch.randn(E, O, D), torch.rand(4, 2)
    plan = route_plan(IDS.to("meta"), E)
    A, B, down = torch.randn(E, 2, D), torch.randn(E, O, 2), torch.randn(E, D, O)
    for call in (
        lambda: grouped_mm(x, weight, plan, gather=True),
        lambda: experts_mlp(x, weight, down, None, w, plan=plan),
        lambda: lora_grouped(x, weight, A, B, plan, gather=True),
    ):
        with pytest.raises(KernelError, match="device of the plan is meta, expected cpu"):
            call()
