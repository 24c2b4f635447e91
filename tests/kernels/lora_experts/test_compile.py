"""The registered operator: opcheck, whole-graph compilation, gradients and FLOPs equal to eager."""

import pytest
import torch
from moe_kit_kernels import lora_down, lora_experts, lora_up, route_plan, route_plan_pairs
from moe_kit_kernels.lora_experts.ops import lora_experts_backward_op, lora_experts_op
from moe_kit_kernels.lora_linear import lora_linear_group
from torch.utils.flop_counter import FlopCounterMode

from tests.tolerances import assert_close

T, E, K, D, O, L = 9, 4, 2, 8, 12, 4


def inputs(dtype=torch.float32):
    return {
        "x": torch.randn(T, D, dtype=dtype, requires_grad=True),
        "A": torch.randn(E, L, D, dtype=dtype, requires_grad=True),
        "B": torch.randn(E, O, L, dtype=dtype, requires_grad=True),
        "weights": torch.rand(T, K, requires_grad=True),
        "base": torch.randn(T, O, dtype=dtype, requires_grad=True),
    }


IDS = torch.tensor([[0, 1], [2, -1], [3, 3], [9, 0], [-1, -1], [1, 2], [0, 3], [2, 1], [1, 0]])


def gradients(function, leaves):
    ys = function(**leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    generator = torch.Generator().manual_seed(3)
    loss = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in ys)
    return ys, torch.autograd.grad(loss, list(leaves.values()))


def same_compiled(function, leaves, backend="aot_eager"):
    torch._dynamo.reset()
    ys, grads = gradients(torch.compile(function, fullgraph=True, backend=backend), leaves)
    expected_ys, expected = gradients(function, leaves)
    for y, e in zip(ys, expected_ys, strict=True):
        assert_close("y", y, e)
    for name, g, e in zip(leaves, grads, expected, strict=True):
        assert_close(f"d{name}", g, e)


@pytest.mark.parametrize("backend", ["dense", "sorted"])
@pytest.mark.parametrize("case", ["ids", "pairs", "every", "no base"])
def test_opcheck(backend, case):
    i = inputs()
    token = ids = None
    weights, base = i["weights"], i["base"]
    if case == "ids":
        ids = IDS
    elif case == "pairs":
        token, ids, weights = torch.tensor([3, 0, 3, 8]), torch.tensor([1, 0, 2, 5]), torch.rand(4, requires_grad=True)
    elif case == "every":
        weights = torch.rand(T, E, requires_grad=True)
    else:
        ids, base = IDS, None
    torch.library.opcheck(lora_experts_op, (i["x"], i["A"], i["B"], ids, token, weights, base, 0.5, backend))


def test_opcheck_of_the_backward():
    i = {name: t.detach() for name, t in inputs().items()}
    y, H = lora_experts_op(i["x"], i["A"], i["B"], IDS, None, i["weights"], None, 1.0, "dense")
    for needs in ([True] * 4, [False, True, False, True]):
        args = (torch.ones_like(y), i["x"], i["A"], i["B"], IDS, None, i["weights"], H, 1.0, "dense", needs)
        torch.library.opcheck(lora_experts_backward_op, args)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_lora_experts(compiler):
    same_compiled(lambda x, A, B, weights, base: lora_experts(x, A, B, IDS, weights, base_TO=base), inputs(), compiler)


def test_compiled_with_a_plan_made_inside_and_of_pairs():
    def table(x, A, B, weights, base):
        return lora_experts(x, A, B, None, weights, plan=route_plan(IDS, E), base_TO=base)

    same_compiled(table, inputs())
    token, expert = torch.arange(T).repeat_interleave(K), IDS.reshape(-1).clamp(max=3)

    def pairs(x, A, B, weights, base):
        plan = route_plan_pairs(token, expert, T, E)
        return lora_experts(x, A, B, None, weights.view(-1), plan=plan, base_TO=base)

    same_compiled(pairs, inputs())


def test_compiled_linear_group():
    W = torch.randn(O, D)

    def function(x, A, B, weights, base):
        q, k = lora_linear_group(x, [W, W], [None, None], [A, A * 2], [B, B], IDS, weights)
        return q + base, k

    same_compiled(function, inputs())


def test_compiled_halves():
    def function(x, A, B, weights, base):
        plan = route_plan(IDS, E)
        H, H2 = lora_down(x, (A, 2 * A), plan)
        return lora_up(H + H2.tanh(), B, plan, weights, base_TO=base, scale=0.5)

    same_compiled(function, inputs())


def test_compiled_under_checkpointing_and_autocast():
    from torch.utils.checkpoint import checkpoint

    def function(x, A, B, weights, base):
        return checkpoint(lambda x: lora_experts(x, A, B, IDS, weights, base_TO=base), x, use_reentrant=False)

    same_compiled(function, inputs())
    leaves = {n: t.detach() for n, t in inputs().items()}

    def plain(x, A, B, weights, base):
        return lora_experts(x, A, B, IDS, weights, base_TO=base)

    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        y = torch.compile(plain, fullgraph=True, backend="aot_eager")(**leaves)
        expected = plain(**leaves)
    assert_close("y", y, expected, torch.bfloat16)


def test_flops_are_those_of_the_chosen_experts():
    i = inputs()
    with FlopCounterMode(display=False) as counter:
        y, _ = lora_experts_op(i["x"], i["A"], i["B"], IDS, None, i["weights"], i["base"], 1.0, "dense")
    assert counter.get_total_flops() == 2 * T * K * L * (D + O)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * T * K * L * (D + O)
