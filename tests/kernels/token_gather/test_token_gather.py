import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kit_kernels import KernelError, token_gather, token_scatter
from moe_kit_kernels.token_gather import reference

from tests.tolerances import assert_close

KEEP = {
    "none": [False] * 5,
    "all": [True] * 5,
    "some": [False, True, True, False, True],
    "empty": [],
    "one": [True],
}


def naive(x_TD, keep_T, weights_T, unit):
    rows = []
    for t in range(x_TD.shape[0]):
        row = x_TD[t]
        if keep_T[t]:
            weight = 1.0 if weights_T is None else weights_T[t]
            row = row + weight * unit(x_TD[t : t + 1])[0]
        rows.append(row)
    return torch.stack(rows) if rows else x_TD.clone()


@settings(max_examples=40, deadline=None)
@given(keep=st.lists(st.booleans(), max_size=40), extra=st.integers(0, 5))
def test_index_is_ascending_and_complete(keep, extra):
    keep_T = torch.tensor(keep, dtype=torch.bool)
    x_TD = torch.randn(len(keep), 3)
    kept = [t for t, k in enumerate(keep) if k]
    x_ND, index_N = token_gather(x_TD, keep_T)
    assert index_N.tolist() == kept
    assert torch.equal(x_ND, x_TD[kept])
    bound = len(kept) + extra
    x_ND, index_N = token_gather(x_TD, keep_T, bound=bound)
    assert index_N.tolist() == kept + [-1] * extra
    assert torch.equal(index_N, reference.token_index(keep_T, bound))
    assert torch.equal(x_ND[: len(kept)], x_TD[kept])
    assert not x_ND[len(kept) :].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("bound", [None, 7])
@pytest.mark.parametrize("case", KEEP)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_a_loop_over_tokens(case, weighted, bound, dtype, backend, poison_empty):
    keep_T = torch.tensor(KEEP[case], dtype=torch.bool)
    T = len(KEEP[case])
    x = torch.randn(T, 6, dtype=torch.float64)
    w = torch.rand(T, dtype=torch.float64)
    upstream = torch.randn(T, 6, dtype=torch.float64)
    matrix = torch.randn(6, 6, dtype=torch.float64)

    def run(function, dtype):
        x_ = x.to(dtype).requires_grad_()
        w_ = w.to(torch.promote_types(dtype, torch.float32)).requires_grad_() if weighted else None
        m_ = matrix.to(dtype)
        y = function(x_, w_, lambda rows: torch.tanh(rows @ m_))
        if y.requires_grad:
            y.backward(upstream.to(dtype))
        return {"y": y, "dx": x_.grad, "dw": w_.grad if weighted else None}

    def ours(x_, w_, unit):
        x_ND, index_N = token_gather(x_, keep_T, bound=bound, backend=backend)
        return token_scatter(unit(x_ND), index_N, x_, weights_T=w_, backend=backend)

    actual = run(ours, dtype)
    expected = run(lambda x_, w_, unit: naive(x_, keep_T, w_, unit), torch.float64)
    for name, value in expected.items():
        if value is None:
            assert name == "dw"
            assert actual[name] is None or not actual[name].any()
            continue
        assert_close(name, actual[name], value, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("bound", [None, 7])
@pytest.mark.parametrize("case", KEEP)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_base_equals_a_base_of_zeros(case, weighted, bound, dtype, backend, poison_empty):
    keep_T = torch.tensor(KEEP[case], dtype=torch.bool)
    T = len(KEEP[case])
    _, index_N = token_gather(torch.zeros(T, 6), keep_T, bound=bound)
    y = torch.randn(index_N.shape[0], 6).to(dtype)
    w, upstream = torch.rand(T), torch.randn(T, 6).to(dtype)
    results = []
    for base, count in ((None, T), (torch.zeros(T, 6, dtype=dtype), None)):
        y_, w_ = y.clone().requires_grad_(), w.clone().requires_grad_() if weighted else None
        out = token_scatter(y_, index_N, base, num_tokens=count, weights_T=w_, backend=backend)
        if out.requires_grad:
            # the reference has nothing to differentiate without a slot
            out.backward(upstream)
        results.append([out, y_.grad, w_.grad if weighted else None])
    for name, actual, expected in zip(("y", "dy", "dw"), *results):
        if expected is None:
            assert actual is None
            continue
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected), name


def test_two_sets_of_tokens_are_placed_at_once():
    x = torch.randn(6, 2)
    first_T = torch.tensor([True, False, False, True, False, True])
    parts = [token_gather(x, keep_T) for keep_T in (first_T, ~first_T)]
    y_ND, index_N = (torch.cat(values) for values in zip(*parts))
    assert torch.equal(token_scatter(y_ND, index_N, None, num_tokens=6), x)


def test_gradcheck():
    keep_T = torch.tensor([True, False, True, True])
    _, index_N = token_gather(torch.randn(4, 3), keep_T, bound=4)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_gather(x, keep_T, bound=4)[0], (x,))
    assert torch.autograd.gradcheck(lambda y, x, w: token_scatter(y, index_N, x, weights_T=w), (y, x, w))


def test_unused_slots_may_hold_anything():
    keep_T = torch.tensor([False, True, False])
    x = torch.randn(3, 2)
    x_ND, index_N = token_gather(x, keep_T, bound=3)
    y_ND = x_ND.clone()
    y_ND[1:] = float("nan")
    w = torch.ones(3, requires_grad=True)
    y = token_scatter(y_ND, index_N, x, weights_T=w)
    y.sum().backward()
    assert not y.isnan().any()
    assert not w.grad.isnan().any()
    assert w.grad[0] == w.grad[2] == 0


def test_inputs_stay_as_they_are_and_the_result_repeats():
    keep_T = torch.rand(64) < 0.5
    x, y = torch.randn(64, 8), torch.randn(int(keep_T.sum()), 8)
    _, index_N = token_gather(x, keep_T)
    before = x.clone()
    first = token_scatter(y, index_N, x)
    assert torch.equal(x, before)
    assert torch.equal(first, token_scatter(y, index_N, x))


def test_compiles_with_static_shapes():
    keep_T = torch.tensor([True, False, True, True, False])
    x = torch.randn(5, 4, requires_grad=True)
    w = torch.rand(5, requires_grad=True)

    def block(x, keep_T, w):
        x_ND, index_N = token_gather(x, keep_T)
        return token_scatter(torch.tanh(x_ND), index_N, x, weights_T=w)

    expected = block(x, keep_T, w)
    actual = torch.compile(block, fullgraph=True, backend="aot_eager")(x, keep_T, w)
    assert_close("y", actual, expected)
    assert_close("dx", *(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (actual, expected)))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: token_gather(torch.zeros(3), torch.ones(3, dtype=torch.bool)), "two dimensions"),
        (lambda: token_gather(torch.zeros(3, 2), torch.ones(3)), "must be bool"),
        (lambda: token_gather(torch.zeros(3, 2), torch.ones(2, dtype=torch.bool)), r"shape \(3,\)"),
        (lambda: token_gather(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool), bound=2), "3 tokens are kept"),
        (lambda: token_gather(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool), bound=-1), "at least 0"),
        (lambda: token_gather(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool), backend="fast"), "'fast'"),
        (lambda: token_gather(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool), backend="triton"), "CUDA device"),
        (lambda: token_scatter(torch.zeros(1, 2), torch.zeros(1).int(), torch.zeros(3, 2)), "int64"),
        (lambda: token_scatter(torch.zeros(1, 3), torch.zeros(1).long(), torch.zeros(3, 2)), "width 3"),
        (
            lambda: token_scatter(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(3, 2), weights_T=torch.ones(1)),
            "weights_T",
        ),
        (lambda: token_scatter(torch.zeros(1, 2), torch.tensor([0]), None), "None and no num_tokens"),
        (
            lambda: token_scatter(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(3, 2), num_tokens=3),
            "and num_tokens",
        ),
        (
            lambda: token_scatter(torch.zeros(1, 2), torch.tensor([0]), None, num_tokens=3, weights_T=torch.ones(2)),
            r"shape \(3,\)",
        ),
        (
            lambda: token_scatter(torch.zeros(1, 2, device="meta"), torch.tensor([0]), torch.zeros(3, 2)),
            "is on meta",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, match):
    with pytest.raises(KernelError, match=match):
        call()
