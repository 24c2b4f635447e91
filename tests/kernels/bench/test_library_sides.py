"""Adapters of other libraries, called against modules that have the documented signatures, layouts and nothing else."""

import argparse
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from bench import _kernel_sides, _library_sides, kernels
from tests.tolerances import assert_close

SMALL = {"tokens": 7, "experts": 4, "top_k": 2, "rank": 4, "d_in": 8, "d_out": 12, "peer": [], "dtype": "float32"}


def scattermoe():
    """As in scattermoe/parallel_experts.py: weights [E, in, out], rows by `i // k`, gates combine."""

    def flatten_sort_count(expert_idxs, num_experts):
        flat = expert_idxs.flatten()
        values, order = torch.sort(flat)
        return values, order, flat.bincount(minlength=num_experts).cumsum(-1)

    def parallel_linear(
        inputs,
        expert_weights,
        k,
        sorted_expert_idxs,
        sorted_scattered_idxs,
        expert_offsets,
        expert_biases=None,
        gates=None,
        grouped_in=False,
        grouped_out=False,
    ):
        assert expert_offsets[-1] == len(sorted_expert_idxs)
        assert expert_weights.dtype is inputs.dtype
        rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
        out = torch.stack([row @ expert_weights[e] for row, e in zip(rows, sorted_expert_idxs.tolist(), strict=True)])
        if not grouped_out:
            out = torch.zeros_like(out).index_copy(0, sorted_scattered_idxs, out)
        if gates is not None:
            assert gates.dtype is out.dtype
            out = (gates.unsqueeze(1) @ out.view(*gates.shape, -1)).squeeze(1)
        return out

    return SimpleNamespace(flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)


def block(x, gate_up, down, token, expert, weight):
    """Rows one by one: gate rows of the stack before value rows."""
    y = torch.zeros_like(x)
    for t, e, w in zip(token.tolist(), expert.tolist(), weight, strict=True):
        gate, value = (gate_up[e] @ x[t]).chunk(2)
        y = y.index_add(0, torch.tensor([t]), (w * (down[e] @ (F.silu(gate) * value)))[None])
    return y


def liger():
    """As in liger_kernel/ops/fused_moe.py: (T, H), (E, 2 I, H), (E, H, I), int32 ids, scores."""

    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        T, K = top_k_index.shape
        assert top_k_index.dtype is torch.int32
        assert gate_up_proj.shape[1:] == (2 * down_proj.shape[2], x.shape[1])
        token = torch.arange(T).repeat_interleave(K)
        return block(x, gate_up_proj, down_proj, token, top_k_index.reshape(-1), top_k_weights.reshape(-1))

    return SimpleNamespace(LigerFusedMoEFunction=SimpleNamespace(apply=apply))


def sonic():
    """As in sonicmoe/functional: (2 I, H, E) and (H, I, E) with E slowest in memory, flat pairs in token order."""

    def moe_general_routing_inputs(
        x,
        router_scores,
        token_indices,
        expert_indices,
        w1,
        b1,
        w2,
        b2,
        E,
        stream_id,
        activation_type,
        is_inference_mode_enabled=False,
        concat_layout=False,
    ):
        assert activation_type == "swiglu"
        assert (token_indices.diff() >= 0).all()
        assert token_indices.dtype is expert_indices.dtype is torch.int32
        assert w1.shape[::2] == (2 * w2.shape[1], E)
        for w in (w1, w2):
            assert w.stride(2) > w.stride(0) > w.stride(1) == 1
        if not concat_layout:
            w1 = torch.cat([w1[::2], w1[1::2]])
        pairs = token_indices, expert_indices, router_scores
        return block(x, w1.permute(2, 0, 1), w2.permute(2, 0, 1), *pairs), torch.zeros(E)

    enums = ModuleType("sonicmoe.enums")
    enums.ActivationType = SimpleNamespace(SWIGLU="swiglu")
    return SimpleNamespace(moe_general_routing_inputs=moe_general_routing_inputs, enums=enums)


STUBS = {"scattermoe": scattermoe, "liger_kernel.ops": liger, "sonicmoe": sonic}


@pytest.fixture
def installed(monkeypatch):
    for name, make in STUBS.items():
        stub = make()
        monkeypatch.setitem(sys.modules, name, stub)
        if hasattr(stub, "enums"):
            monkeypatch.setitem(sys.modules, f"{name}.enums", stub.enums)
    monkeypatch.setattr(_library_sides, "cannot", lambda *_: None)


@pytest.mark.parametrize("operator", _library_sides.ADAPTERS)
def test_adapters_give_the_loops_result_and_gradients(operator, installed):
    ids = torch.rand(7, 4).topk(2).indices
    sides = _kernel_sides.BUILD[operator](argparse.Namespace(**SMALL), ids)
    assert set(_library_sides.ADAPTERS[operator]) <= set(sides.functions)
    assert not sides.left_out
    kernels.check(sides.functions, sides.inputs, 1e-4)


def test_a_wrong_layout_is_noticed(installed, monkeypatch):
    # interleaved rows taken for concatenated ones
    right = sys.modules["sonicmoe"].moe_general_routing_inputs
    wrong = lambda *args, concat_layout, **more: right(*args, **more)  # noqa: E731
    monkeypatch.setattr(sys.modules["sonicmoe"], "moe_general_routing_inputs", wrong)
    sides = _kernel_sides.BUILD["experts_mlp"](argparse.Namespace(**SMALL), torch.rand(7, 4).topk(2).indices)
    with pytest.raises(AssertionError, match="SonicMoE: tensor 0 differs from the loop"):
        kernels.check(sides.functions, sides.inputs, 1e-4)


def test_gates_take_the_dtype_of_x(installed):
    ids = torch.tensor([[0, 1], [1, 0]])
    x, A, B = (torch.randn(*size, dtype=torch.bfloat16) for size in ((2, 8), (2, 4, 8), (2, 8, 4)))
    run = _library_sides.scattermoe_lora(sys.modules["scattermoe"], ids, 2)
    y = run(x, A, B, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    expected = torch.stack([B[e] @ (A[e] @ row) for row, e in zip(x, (0, 1), strict=True)])
    assert_close("y", y, expected, torch.bfloat16)


def test_reasons(monkeypatch):
    for name in STUBS:
        monkeypatch.setitem(sys.modules, name, None)
    cuda = torch.device("cuda")
    assert "not importable" in _library_sides.cannot("scattermoe", cuda, torch.bfloat16, (512, 64))
    sides, left_out = _library_sides.library_sides(
        "experts_mlp", torch.zeros(2, 1, dtype=torch.long), 4, torch.bfloat16, (512, 64)
    )
    assert not sides
    assert set(left_out) == {"scattermoe", "Liger", "SonicMoE"}
    for name in STUBS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert _library_sides.cannot("Liger", torch.device("cpu"), torch.bfloat16, (512, 64)) == "its kernels need a GPU"
    for capability, dtype, widths, reason in (
        ((8, 0), torch.bfloat16, (512, 64), "needs a Hopper GPU or a later one"),
        ((9, 0), torch.float32, (512, 64), "takes bfloat16 and float16, not float32"),
        ((9, 0), torch.bfloat16, (480, 64), "takes widths in multiples of 64, the model's from 512"),
        ((9, 0), torch.bfloat16, (512, 64), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert _library_sides.cannot("SonicMoE", cuda, dtype, widths) == reason
    assert _library_sides.cannot("Liger", cuda, torch.float32, (480, 50)) is None


def test_the_table_says_what_was_left_out(capsys):
    sizes = {"tokens": 6, "experts": 3, "d-in": 8, "d-out": 8, "rank": 4, "rounds": 2}
    kernels.main(["--operator", "lora_experts", *(f"--{name}={value}" for name, value in sizes.items())])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("lora_experts: left out: scattermoe, ")
