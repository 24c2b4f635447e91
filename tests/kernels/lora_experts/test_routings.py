"""Routings of every kind through every public function: pairs, dropped slots that hold NaN, ids and plans that do not fit."""

import pytest
import torch
from moe_kit_kernels import KernelError, lora_down, lora_experts, lora_linear, lora_up, route_plan, route_plan_pairs
from moe_kit_kernels.lora_experts import dispatch

from tests.kernels.lora_cases import compare, make
from tests.tolerances import assert_close

NAN = float("nan")


@pytest.mark.parametrize("pairs", [0, 1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_auto_takes_pairs_without_gradients(pairs, dtype):
    # sizes at which a table of ids is decoded
    T, E, D, O, L = 2, 64, 512, 384, 8
    plan = route_plan_pairs(torch.randint(-1, T + 1, (pairs,)), torch.randint(-1, E + 1, (pairs,)), T, E)
    x, w, W = torch.randn(T, D).to(dtype), torch.rand(pairs), torch.randn(O, D).to(dtype) / D**0.5
    A, B = (torch.randn(E, L, D) / D**0.5).to(dtype), torch.randn(E, O, L).to(dtype)
    assert dispatch.choose(T, T, E, L, D, O, x.element_size(), False, x.device, False) == "decode"
    calls = [
        lambda how: lora_experts(x, A, B, None, w, plan=plan, backend=how),
        lambda how: lora_experts(x, A, B, None, w, plan=plan, base_TO=x @ W.t(), backend=how),
        lambda how: lora_linear(x, W, None, A, B, None, w, plan=plan, backend=how),
        lambda how: lora_up(lora_down(x, A, plan, backend=how), B, plan, w, backend=how),
    ]
    with torch.no_grad():
        for call in calls:
            assert_close("y", call("auto"), call("reference"))
        with pytest.raises(KernelError, match=r"'decode' with free pairs.*Use backend=\"auto\""):
            calls[0]("decode")


IDS = torch.tensor([[0, -1], [1, 7], [2, 0], [-1, -1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["table", "pairs"])
@pytest.mark.parametrize("backend", ["dense", "sorted", "auto", "traced"])
def test_weights_of_dropped_slots_may_be_nan(backend, kind, dtype, monkeypatch):
    x, A, B, base, ids, weights = make(4, 3, 2, 8, 8, 4, dtype=dtype, ids=IDS)
    plan = route_plan(ids, 3)
    if kind == "pairs":
        plan, weights = route_plan_pairs(plan.token_P, ids.reshape(-1), 4, 3), weights.detach().reshape(-1)
    W, how = torch.randn(8, 8).to(dtype), backend
    if backend == "traced":
        how = "auto"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    half = how if how == "auto" else "dense"
    calls = {
        "lora_experts": lambda w: lora_experts(x, A, B, None, w, plan=plan, base_TO=base, backend=how),
        "lora_linear": lambda w: lora_linear(x, W, None, A, B, None, w, plan=plan, backend=how),
        "halves": lambda w: lora_up(lora_down(x, A, plan, backend=half), B, plan, w, base_TO=base, backend=half),
    }
    dropped = (plan.expert_P == 3).view_as(weights)
    for name, call in calls.items():
        results = []
        for value in (0.0, NAN):
            w = weights.detach().masked_fill(dropped, value).requires_grad_()
            y = call(w)
            # weights reach every gradient
            gradients = torch.autograd.grad(y.float().square().sum(), (x, A, B, w))
            results.append((y, *gradients))
        for what, clean, with_nan in zip(("y", "dx", "dA", "dB", "dw"), *results):
            assert_close(f"{what} of {name}", with_nan, clean)
        assert not results[1][-1][dropped].any()


def test_what_a_dropped_pair_holds_does_not_matter():
    plan, w = route_plan(IDS, 3), torch.rand(4, 2)
    B, dropped = torch.randn(3, 5, 4), (route_plan(IDS, 3).expert_P == 3)[:, None]
    results = []
    for value in (0.0, NAN):
        H = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).masked_fill(dropped, value).requires_grad_()
        weights = w.clone().requires_grad_()
        y = lora_up(H, B, plan, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), (H, weights))))
    for clean, with_nan in zip(*results):
        assert_close("with NaN in dropped pairs", with_nan, clean)


@pytest.mark.parametrize("ids", [torch.tensor([[1.0]]), torch.tensor([[True]]), torch.tensor([[1j]])], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 90])
@pytest.mark.parametrize("backend", ["auto", "dense", "sorted", "decode", "reference"])
@pytest.mark.parametrize("gradients", [False, True])
def test_ids_are_integers(gradients, backend, tokens, ids):
    x, A, B, _, _, _ = make(tokens, 4, 1, 8, 8, 2, dtype=torch.float32)
    weights, W = torch.rand(tokens, 1), torch.randn(8, 8)
    if gradients and backend == "decode":
        pytest.skip("decode has no gradients")
    message = "dtype of the expert ids is .*expected an integer dtype. Convert them"
    with torch.set_grad_enabled(gradients):
        for call in (
            lambda i: lora_experts(x, A, B, i, weights, backend=backend),
            lambda i: lora_linear(x, W, None, A, B, i, weights, backend=backend),
        ):
            with pytest.raises(KernelError, match=message):
                call(ids.expand(tokens, 1))
            for kind in (torch.int16, torch.int32, torch.uint8):
                call(torch.ones(tokens, 1, dtype=kind))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 2)])
def test_weights_of_decoded_linears_fit_the_ids(shape):
    x, A, B, _, _, _ = make(1, 4, 2, 8, 8, 2, dtype=torch.float32)
    with torch.no_grad(), pytest.raises(KernelError, match="shape of weights_TK"):
        lora_linear(x, torch.randn(8, 8), None, A, B, torch.tensor([[0, 1]]), torch.rand(shape), backend="decode")


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
def test_plans_on_another_device(backend, gradients):
    x, A, B, _, ids, weights = make(3, 4, 2, 8, 8, 2, dtype=torch.float32)
    W, H = torch.randn(8, 8), torch.randn(6, 2)
    table = route_plan(ids.to("meta"), 4)
    pairs = route_plan_pairs(table.token_P, ids.to("meta").view(-1), 3, 4)
    for plan in (table, pairs):
        for call in (
            lambda plan: lora_experts(x, A, B, None, weights, plan=plan, backend=backend),
            lambda plan: lora_linear(x, W, None, A, B, None, weights, plan=plan, backend=backend),
            lambda plan: lora_down(x, A, plan, backend=backend),
            lambda plan: lora_up(H, B, plan, weights, backend=backend),
        ):
            message = "device of the plan is meta, expected cpu. Build the plan from ids on cpu"
            with torch.set_grad_enabled(gradients), pytest.raises(KernelError, match=message):
                call(plan)


@pytest.mark.parametrize("K", [0, 9])
def test_few_and_many_slots(K):
    ids = torch.stack([torch.randperm(12)[:K] for _ in range(5)])
    x, A, B, base, ids, weights = make(5, 12, K, 8, 8, 2, ids=ids)
    inputs = {"x": x, "A": A, "B": B, "weights": weights, "base": base}

    def call(how):
        return lambda x, A, B, weights, base: lora_experts(x, A, B, ids, weights, base_TO=base, backend=how)

    for how in ("auto", "dense", "sorted"):
        compare(call(how), call("reference"), inputs)
