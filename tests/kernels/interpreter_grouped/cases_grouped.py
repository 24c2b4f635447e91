"""Run by test_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os

import pytest
import torch
from moe_kit_kernels import experts_mlp, grouped_mm, lora_grouped, route_plan, route_plan_pairs
from moe_kit_kernels.grouped_mm import sizes

from tests.tolerances import assert_close

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"

# ids [T, K], E, D, H: widths below, at and above the tiles of 64 and 128
EDGES = {
    "balanced": ([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2]], 4, 24, 20),
    "odd widths": ([[0, 1], [1, 2], [2, 1]], 3, 67, 33),
    "wider than a tile": ([[0, 1], [1, 0]], 2, 136, 72),
    "all to one": ([[1]] * 19, 3, 16, 16),
    "empty experts": ([[6, 0], [6, 0], [0, 6]], 9, 16, 16),
    "one token": ([[2, 0, 1]], 3, 16, 8),
    "empty slots": ([[0, -1], [-1, -1], [5, 1], [1, 7]], 2, 16, 16),
    "nothing chosen": ([[-1, -1], [-1, -1]], 2, 16, 16),
    "tile borders": ([[0]] * 15 + [[1]] * 16 + [[2]] * 17 + [[3]], 4, 16, 16),
    "no token": ([], 3, 16, 8),
}


def ids_of(rows):
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 2)


def run(function, tensors, upstream):
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = function(leaves)
    y.backward(upstream.to(y.dtype))
    return {"y": y, **{name: None if t is None else t.grad for name, t in leaves.items()}}


def compare(function, tensors, upstream, dtype=torch.float32):
    expected = run(lambda t: function(t, "reference"), tensors, upstream)
    actual = run(lambda t: function(t, "triton"), tensors, upstream)
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None or not actual[name].any(), name
        else:
            assert_close(name, actual[name], value, dtype)


def block(ids, E, D, H, *, gated=True, bias=False, dtype=torch.float32):
    F = 2 * H if gated else H
    tensors = {
        "x_TD": torch.randn(ids.shape[0], D).to(dtype),
        "up_EFD": (torch.randn(E, F, D) / D**0.5).to(dtype),
        "down_EDH": (torch.randn(E, D, H) / H**0.5).to(dtype),
        "weights_TK": torch.rand(ids.shape),
        "up_bias_EF": torch.randn(E, F).to(dtype) if bias else None,
        "down_bias_ED": torch.randn(E, D).to(dtype) if bias else None,
    }
    return tensors, torch.randn(ids.shape[0], D)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_experts_mlp(edge, bias, poison_empty):
    rows, E, D, H = EDGES[edge]
    ids = ids_of(rows)
    tensors, upstream = block(ids, E, D, H, bias=bias)
    compare(lambda t, backend: experts_mlp(**t, expert_ids_TK=ids, backend=backend), tensors, upstream)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(activation, gated, poison_empty):
    ids = ids_of([[0, 1], [1, 2], [2, 0]])
    tensors, upstream = block(ids, 3, 16, 16, gated=gated)
    options = {"expert_ids_TK": ids, "activation": activation}
    compare(lambda t, backend: experts_mlp(**t, **options, backend=backend), tensors, upstream)


def test_half_precision(poison_empty):
    ids = ids_of([[0, 1], [1, 2], [2, 0]] * 3)
    tensors, upstream = block(ids, 3, 32, 32, dtype=torch.float16)
    compare(lambda t, backend: experts_mlp(**t, expert_ids_TK=ids, backend=backend), tensors, upstream, torch.float16)


def test_taller_tiles_and_transposed_stacks(poison_empty):
    ids = torch.cat([torch.zeros(70, 1), torch.ones(3, 1)]).long()
    tensors, upstream = block(ids, 2, 24, 16)

    def function(t, backend):
        up, down = (t[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("up_EFD", "down_EDH"))
        return experts_mlp(t["x_TD"], up, down, ids, t["weights_TK"], backend=backend)

    tensors = {name: t for name, t in tensors.items() if t is not None}
    compare(function, tensors, upstream)


@pytest.mark.parametrize("edge", ["all to one", "empty experts", "tile borders", "empty slots"])
@pytest.mark.parametrize("transposed", [False, True])
def test_split_experts(edge, transposed, monkeypatch, poison_empty):
    # chunks of at most four rows: most experts of these cases are summed in parts
    monkeypatch.setattr(sizes, "LEAST_CHUNK", 4)
    rows, E, D, H = EDGES[edge]
    ids = ids_of(rows)
    tensors, upstream = block(ids, E, D, H, bias=True)

    def function(t, backend):
        up, down = t["up_EFD"], t["down_EDH"]
        if transposed:
            up, down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (up, down))
        return experts_mlp(**{**t, "up_EFD": up, "down_EDH": down}, expert_ids_TK=ids, backend=backend)

    compare(function, tensors, upstream)
    first, second = (run(lambda t: function(t, "triton"), tensors, upstream) for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_free_pairs(poison_empty):
    plan = route_plan_pairs(torch.tensor([3, 0, 0, 2, 0]), torch.tensor([1, 0, 2, 1, 1]), 4, 3)
    tensors, upstream = block(torch.zeros(4, 1, dtype=torch.int64), 3, 16, 16)
    tensors["weights_TK"] = torch.rand(5)
    compare(lambda t, backend: experts_mlp(**t, expert_ids_TK=None, plan=plan, backend=backend), tensors, upstream)


OPTIONS = {
    "plain": {},
    "bias and gate": {"bias": True, "weights": True},
    "gated": {"activation": "silu", "gated": True, "weights": True, "residual": True},
    "residual": {"residual": True},
}


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("edge", ["balanced", "empty slots", "empty experts"])
def test_grouped_mm(edge, option, gather, scatter, poison_empty):
    rows, E, D, _ = EDGES[edge]
    ids, O = ids_of(rows), 18
    P, options = ids.numel(), dict(OPTIONS[option])
    width = O // 2 if options.get("gated") else O
    tensors = {
        "x": torch.randn(ids.shape[0] if gather else P, D),
        "weight_EOD": torch.randn(E, O, D),
        "bias_EO": torch.randn(E, O) if options.pop("bias", False) else None,
        "weights": torch.rand(ids.shape) if options.pop("weights", False) else None,
        "residual": torch.randn(P, width) if options.pop("residual", False) else None,
    }
    plan = route_plan(ids, E)
    options |= {"plan": plan, "gather": gather, "scatter": scatter}
    compare(lambda t, backend: grouped_mm(**t, **options, backend=backend), tensors, torch.randn(P, width))


def test_repeats_bit_for_bit():
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(20)])
    tensors, upstream = block(ids, 4, 16, 16)
    tensors = {name: t for name, t in tensors.items() if t is not None}
    results = [run(lambda t: experts_mlp(**t, expert_ids_TK=ids, backend="triton"), tensors, upstream) for _ in "ab"]
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("rank", [1, 5, 16, 70])
@pytest.mark.parametrize("edge", ["balanced", "empty slots"])
def test_lora_grouped(edge, rank, gather, scatter, poison_empty):
    rows, E, D, _ = EDGES[edge]
    ids, O = ids_of(rows), 18
    tensors = {
        "x": torch.randn(ids.shape[0] if gather else ids.numel(), D),
        "weight_EOD": torch.randn(E, O, D),
        "A_ELD": torch.randn(E, rank, D) / rank**0.5,
        "B_EOL": torch.randn(E, O, rank),
    }
    options = {"plan": route_plan(ids, E), "gather": gather, "scatter": scatter, "scale": 0.5}
    compare(lambda t, backend: lora_grouped(**t, **options, backend=backend), tensors, torch.randn(ids.numel(), O))


@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_residual_of_another_dtype(dtypes, scatter, poison_empty):
    ids = ids_of(EDGES["empty slots"][0])
    low = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    tensors = {
        "x": torch.randn(ids.shape[0], 16).to(dtypes[0]),
        "weight_EOD": (torch.randn(2, 18, 16) / 4).to(dtypes[0]),
        "residual": torch.randn(ids.numel(), 18).to(dtypes[1]),
    }
    options = {"plan": route_plan(ids, 2), "gather": True, "scatter": scatter}

    def function(t, backend):
        y = grouped_mm(**t, **options, backend=backend)
        assert y.dtype is dtypes[0]
        return y

    upstream = torch.randn(ids.numel(), 18)
    compare(function, tensors, upstream, low)
    gradients = run(lambda t: function(t, "triton"), tensors, upstream)
    assert all(gradients[name].dtype is t.dtype for name, t in tensors.items())


def test_weights_of_dropped_slots_may_be_nan(poison_empty):
    rows, E, D, H = EDGES["empty slots"]
    ids = ids_of(rows)
    dropped = (ids < 0) | (ids >= E)
    tensors, upstream = block(ids, E, D, H, bias=True)
    x, up, plan = tensors["x_TD"], tensors["up_EFD"], route_plan(ids, E)
    calls = {
        "experts_mlp": (lambda t: experts_mlp(**t, expert_ids_TK=ids, backend="triton"), tensors, upstream),
        "grouped_mm": (
            lambda t: grouped_mm(**t, plan=plan, gather=True, activation="silu", backend="triton"),
            {"x": x, "weight_EOD": up, "weights": tensors["weights_TK"]},
            torch.randn(ids.numel(), up.shape[1]),
        ),
    }
    for name, (function, t, upstream_) in calls.items():
        key = next(key for key in t if key.startswith("weights"))
        clean, with_nan = (
            run(function, t | {key: t[key].masked_fill(dropped, value)}, upstream_) for value in (0.0, float("nan"))
        )
        for what, value in clean.items():
            assert_close(f"{what} of {name}", with_nan[what], value)
