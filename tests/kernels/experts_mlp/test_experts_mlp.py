import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kit_kernels import KernelError, experts_mlp, route_plan, route_plan_pairs

from tests.kernels.experts_cases import EDGES, GRADIENTS, case, compare, ids_of, naive, run
from tests.tolerances import assert_close


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_a_loop_over_pairs(edge, gated, bias, backend, poison_empty):
    rows, E = EDGES[edge]
    ids = ids_of(rows)
    t = case(ids, E, gated=gated, bias=bias)
    upstream = torch.randn(ids.shape[0], 10, dtype=torch.float64)
    expected = run(lambda t: naive(ids, t), t, upstream)
    actual = run(lambda t: experts_mlp(**{**t, "expert_ids_TK": ids}, backend=backend), t, upstream)
    compare(actual, expected, t, torch.float64)


@pytest.mark.parametrize("routing", ["uniform", "around the swapped GEMM", "few rows", "few rows and empty slots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype, routing, poison_empty):
    ids = {
        "uniform": torch.stack([torch.randperm(6)[:3] for _ in range(60)]),
        "around the swapped GEMM": ids_of(EDGES["around the swapped GEMM"][0]),
        "few rows": ids_of([[0, 1], [2, 3], [1, 5], [5, 2]]),
        "few rows and empty slots": ids_of([[0, -1], [2, 3], [-1, 5], [5, 2]]),
    }[routing]
    t = case(ids, 6, D=24, H=16, dtype=torch.float32)
    upstream = torch.randn(ids.shape[0], 24)
    # the reference sees the same rounded inputs, in float64
    rounded = {name: None if v is None else v.to(dtype).double() for name, v in t.items()}
    expected = run(lambda t: naive(ids, t), rounded, upstream.to(dtype).double())
    low = {
        name: None if v is None else v.to(torch.float32 if name == "weights_TK" else dtype)
        for name, v in rounded.items()
    }
    actual = run(lambda t: experts_mlp(**{**t, "expert_ids_TK": ids}), low, upstream.to(dtype))
    assert actual["y"].dtype is dtype
    assert actual["weights_TK"].dtype is torch.float32
    compare(actual, expected, t, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation, gated):
    ids = ids_of([[0, 1], [1, 2], [2, 0], [0, 1]])
    t = case(ids, 3, gated=gated)
    upstream = torch.randn(4, 10, dtype=torch.float64)
    expected = run(lambda t: naive(ids, t, activation), t, upstream)
    for backend in ("cpu", "reference"):
        actual = run(
            lambda t, b=backend: experts_mlp(**{**t, "expert_ids_TK": ids}, activation=activation, backend=b),
            t,
            upstream,
        )
        compare(actual, expected, t, torch.float64)


def test_gradcheck():
    ids = ids_of([[0, 2], [2, -1], [1, 0]])
    t = case(ids, 3, D=4, H=3, bias=True)
    leaves = [t[name].requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradcheck(
        lambda x, u, d, w, bu, bd: experts_mlp(x, u, d, ids, w, up_bias_EF=bu, down_bias_ED=bd), leaves
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_renaming_experts_and_moving_slots_changes_nothing(data):
    T, E = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 7))
    K = data.draw(st.integers(1, E))
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    t = case(ids, E)
    y = experts_mlp(**t, expert_ids_TK=ids)
    name_E = torch.randperm(E)
    renamed = {**t, "up_EFD": t["up_EFD"][name_E.argsort()], "down_EDH": t["down_EDH"][name_E.argsort()]}
    assert_close("renamed", experts_mlp(**renamed, expert_ids_TK=name_E[ids]), y)
    slot_K = torch.randperm(K)
    moved = {**t, "weights_TK": t["weights_TK"][:, slot_K]}
    assert_close("moved", experts_mlp(**moved, expert_ids_TK=ids[:, slot_K]), y)


def test_misrouted_pairs_are_noticed():
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(30)])
    t = case(ids, 6)
    with pytest.raises(AssertionError, match="error ratio"):
        assert_close("y", experts_mlp(**t, expert_ids_TK=(ids + 1) % 6), naive(ids, t))


def test_plan_of_pairs_with_a_variable_number_of_experts():
    token_P, expert_P = torch.tensor([3, 0, 0, 2, 0]), torch.tensor([1, 0, 2, 1, 1])
    plan = route_plan_pairs(token_P, expert_P, 4, 3)
    ids = torch.tensor([[0, 2, 1], [-1, -1, -1], [1, -1, -1], [1, -1, -1]])
    t = case(ids, 3)
    weights_P = torch.rand(5, dtype=torch.float64)
    t["weights_TK"] = torch.zeros(4, 3, dtype=torch.float64)
    for p, (row, slot) in enumerate([(3, 0), (0, 0), (0, 1), (2, 0), (0, 2)]):
        t["weights_TK"][row, slot] = weights_P[p]
    arguments = {**t, "weights_TK": weights_P}
    upstream = torch.randn(4, 10, dtype=torch.float64)
    expected = run(lambda t: naive(ids, t), t, upstream)
    actual = run(lambda t: experts_mlp(**t, expert_ids_TK=None, plan=plan), arguments, upstream)
    assert_close("y", actual["y"], expected["y"])
    assert_close("dx", actual["x_TD"], expected["x_TD"])
    assert_close("dw", actual["weights_TK"], expected["weights_TK"][[3, 0, 0, 2, 0], [0, 0, 1, 0, 2]])


def test_transposed_stacks_and_strided_inputs():
    ids = ids_of([[0, 1], [2, 1], [1, 2]])
    t = case(ids, 3)
    expected = run(lambda t: naive(ids, t), t, torch.ones(3, 10, dtype=torch.float64))
    strided = {name: None if v is None else torch.stack([v, v], -1)[..., 0] for name, v in t.items()}
    up_EDF = t["up_EFD"].transpose(1, 2).contiguous().requires_grad_()
    down_EHD = t["down_EDH"].transpose(1, 2).contiguous().requires_grad_()
    strided |= {"up_EFD": up_EDF.transpose(1, 2), "down_EDH": down_EHD.transpose(1, 2)}
    y = experts_mlp(**strided, expert_ids_TK=ids)
    y.sum().backward()
    assert_close("y", y, expected["y"])
    assert_close("up", up_EDF.grad.transpose(1, 2), expected["up_EFD"])
    assert_close("down", down_EHD.grad.transpose(1, 2), expected["down_EDH"])
    assert up_EDF.grad.is_contiguous()
    assert down_EHD.grad.is_contiguous()


@pytest.mark.parametrize("kept", GRADIENTS)
def test_each_gradient_alone(kept):
    ids = ids_of([[0, 1], [2, 1], [1, 3]])
    t = case(ids, 4, bias=True)
    upstream = torch.randn(3, 10, dtype=torch.float64)
    expected = run(lambda t: naive(ids, t), t, upstream)[kept]
    t[kept].requires_grad_()
    experts_mlp(**t, expert_ids_TK=ids).backward(upstream)
    assert_close(kept, t[kept].grad, expected)
    assert all(v.grad is None for name, v in t.items() if name != kept)


def test_checkpointing_autocast_and_no_grad():
    ids = ids_of([[0, 1], [2, 1], [1, 3]])
    t = case(ids, 4, dtype=torch.float32)
    x = t["x_TD"].requires_grad_()
    y = experts_mlp(**t, expert_ids_TK=ids)
    (expected,) = torch.autograd.grad(y.sum(), x)
    again = torch.utils.checkpoint.checkpoint(
        lambda x: experts_mlp(**{**t, "x_TD": x}, expert_ids_TK=ids), x, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], expected)
    with torch.no_grad():
        assert torch.equal(experts_mlp(**t, expert_ids_TK=ids), y)
    with torch.autocast("cpu", torch.bfloat16):
        low = experts_mlp(**t, expert_ids_TK=ids)
    assert low.dtype is torch.bfloat16
    assert_close("autocast", low, y, torch.bfloat16)
    assert_close("autocast dx", torch.autograd.grad(low.sum(), x)[0], expected, torch.bfloat16)


def test_saves_no_more_than_the_backward_needs():
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(50)])
    t = case(ids, 4, D=32, H=16, dtype=torch.float32)
    inputs = [v.requires_grad_() for v in t.values() if v is not None]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        experts_mlp(**t, expert_ids_TK=ids)
    own = {i.untyped_storage().data_ptr() for i in inputs}
    extra = [s for s in saved if s.untyped_storage().data_ptr() not in own]
    assert [tuple(s.shape) for s in extra] == [(100, 32)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x_TD": torch.zeros(3, 11)}, "shape of x_TD"),
        ({"x_TD": torch.zeros(3, 10, dtype=torch.int64)}, "floating-point"),
        ({"up_EFD": torch.zeros(4, 13, 10)}, "13, expected 14"),
        ({"down_EDH": torch.zeros(3, 10, 7)}, "shape of down_EDH"),
        ({"down_EDH": torch.zeros(4, 10, 7).half()}, "dtype of down_EDH"),
        ({"weights_TK": torch.zeros(3, 3)}, "9 values, expected 6"),
        ({"weights_TK": torch.zeros(3, 2, device="meta")}, "device of weights_TK"),
        ({"expert_ids_TK": torch.tensor([[0, -2], [0, 1], [1, 2]])}, "-2"),
        ({"expert_ids_TK": None}, "expert_ids_TK or a plan"),
        ({"up_bias_EF": torch.zeros(4, 7)}, "up_bias_EF"),
        ({"down_bias_ED": torch.zeros(4, 7)}, "down_bias_ED"),
        ({"activation": "swish"}, "'swish'"),
        ({"backend": "cuda"}, "'cuda'"),
        ({"backend": "triton"}, "CUDA device"),
    ],
)
def test_errors_say_what_is_wrong(change, match):
    ids = ids_of([[0, 1], [2, 1], [1, 3]])
    arguments = {**case(ids, 4, dtype=torch.float32), "expert_ids_TK": ids, **change}
    with pytest.raises(KernelError, match=match):
        experts_mlp(**arguments)


def test_plan_must_fit_the_stack():
    ids = ids_of([[0, 1], [2, 1], [1, 3]])
    with pytest.raises(KernelError, match="num_experts"):
        experts_mlp(**case(ids, 4, dtype=torch.float32), expert_ids_TK=None, plan=route_plan(ids, 5))


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiles_as_one_graph(backend):
    ids = ids_of([[0, 1], [2, 1], [1, -1]])
    t = case(ids, 4, bias=True)
    upstream = torch.randn(3, 10, dtype=torch.float64)
    expected = run(lambda t: naive(ids, t), t, upstream)
    compiled = torch.compile(lambda t: experts_mlp(**t, expert_ids_TK=ids), fullgraph=True, backend=backend)
    compare(run(compiled, t, upstream), expected, t, torch.float64)


def test_custom_operator_keeps_its_promises():
    from moe_kit_kernels.experts_mlp.ops import experts_mlp_op
    from torch.utils.flop_counter import FlopCounterMode

    plan = route_plan(ids_of([[0, 1], [2, 1], [1, -1]]), 4)
    t = case(ids_of([[0, 1], [2, 1], [1, -1]]), 4, bias=True, dtype=torch.float32)
    leaves = [t[name].requires_grad_() for name in ("x_TD", "up_EFD", "down_EDH")]
    weights_P = t["weights_TK"].reshape(-1).detach().requires_grad_()
    arguments = (*leaves, weights_P, plan.token_P, plan.expert_P, t["up_bias_EF"], t["down_bias_ED"], 2, "silu", "cpu")
    torch.library.opcheck(experts_mlp_op, arguments)
    with FlopCounterMode(display=False) as counter:
        experts_mlp_op(*arguments)[0].sum().backward()
    # 6 pairs, D = 10, F = 14, H = 7; the backward makes twice the products of the forward
    assert counter.get_total_flops() == 3 * 2 * 6 * 10 * (14 + 7)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize("kept", [True, False])
def test_gates_stay_wide_under_autocast(kept, tokens, pairs, compiled):
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    t = case(ids, 4, D=16, H=8, bias=True, dtype=torch.float32)
    plan = route_plan(ids, 4)
    if pairs:
        plan = route_plan_pairs(plan.token_P, plan.expert_P, tokens, 4)
        t["weights_TK"] = t["weights_TK"].reshape(-1)

    def function(t):
        return experts_mlp(**t, expert_ids_TK=None, plan=plan)

    def cast(t):
        with torch.autocast("cpu", torch.bfloat16):
            return function(t)

    torch._dynamo.reset()
    cast = torch.compile(cast, fullgraph=True, backend="aot_eager") if compiled else cast
    leaves = {name: tensor.requires_grad_(kept) for name, tensor in t.items()}
    low = {name: tensor if name == "weights_TK" else tensor.bfloat16() for name, tensor in leaves.items()}
    with torch.set_grad_enabled(kept):
        y, expected = cast(leaves), function(low)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, expected)
    if kept:
        upstream = torch.randn(y.shape).bfloat16()
        for name, g, e in zip(
            leaves,
            torch.autograd.grad(y, tuple(leaves.values()), upstream),
            torch.autograd.grad(expected, tuple(leaves.values()), upstream),
        ):
            assert g.dtype is torch.float32
            assert torch.equal(g, e), name
