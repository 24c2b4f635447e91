"""`python -m bench kernels` on tiny shapes: sides, rows, comparison with a baseline, and what it refuses."""

import importlib.util
import json

import pytest
import torch
from moe_kit_kernels import KernelError
from moe_kit_kernels.lora_experts import native

from bench import _kernel_sides, kernels, roofline

SMALL = ["--tokens", "6", "--experts", "3", "--d-in", "8", "--d-out", "8", "--rank", "4", "--rounds", "2"]


def test_rows_baseline_and_plot(tmp_path, capsys):
    path = tmp_path / "rows.json"
    plot = ["--plot", str(tmp_path / "plot.png")] if importlib.util.find_spec("matplotlib") else []
    kernels.main([*SMALL, "--json", str(path), *plot])
    rows = json.loads(path.read_text())
    sides = {(row["operator"], row["side"]) for row in rows}
    peers = {"moe_kit", "torch grouped_mm", "masked GEMMs", "loop", "transformers eager", "transformers batched_mm"}
    assert {("experts_mlp", side) for side in peers} <= sides
    assert {("lora_experts", side) for side in ("moe_kit", "moe_kit again", "masked GEMM pair", "loop")} <= sides
    assert all(row["median_ms"] > 0 and row["roofline_share"] > 0 and row["peak_mb"] > 0 for row in rows)
    assert not plot or (tmp_path / "plot.png").stat().st_size > 1000
    capsys.readouterr()
    kernels.main([*SMALL, "--operator", "lora_experts", "--baseline", str(path)])
    assert "the baseline's speed" in capsys.readouterr().out
    # rows of another shape are not a baseline
    kernels.main([*SMALL, "--operator", "lora_experts", "--baseline", str(path), "--top-k", "1"])
    assert "the baseline's speed" not in capsys.readouterr().out


def wrong(x, A, B, ids, weights):
    return torch.zeros(x.shape[0], B.shape[1]) + 0 * (x.sum() + A.sum() + B.sum() + weights.sum())


def test_a_side_that_differs_is_not_measured(monkeypatch):
    monkeypatch.setattr(_kernel_sides, "wrong", wrong, raising=False)
    with pytest.raises(AssertionError, match="differs from the loop"):
        kernels.main([*SMALL, "--operator", "lora_experts", "--peer", "lora_experts=bench._kernel_sides:wrong"])


@pytest.mark.parametrize("peer", ["lora_experts=nowhere:f", "lora_experts", "lora_experts=bench._kernel_sides:nothing"])
def test_peers_that_cannot_be_had(peer):
    with pytest.raises(KernelError, match="--peer"):
        kernels.main([*SMALL, "--operator", "lora_experts", "--peer", peer])


def test_trace_of_one_step(tmp_path, capsys):
    path = tmp_path / "trace.json"
    kernels.main([*SMALL, "--operator", "lora_experts", "--trace", str(path)])
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    # a forward and a backward of ours, and no other side's
    ours = {"moe_kit_lora_forward", "moe_kit_lora_backward"} if native.NATIVE.available else {"aten::mm"}
    assert ours <= names
    assert any("Backward" in name for name in names)
    assert str(path) in capsys.readouterr().out


def test_loads_of_the_experts(tmp_path):
    tokens, experts, top_k = 200, 8, 2
    for load in ("uniform", "zipf", "one"):
        ids = _kernel_sides.draw_ids(load, tokens, experts, top_k)
        assert ids.shape == (tokens, top_k)
        assert ids.dtype == torch.int64
        assert int(ids.min()) >= 0
        assert int(ids.max()) < experts
        # a token never chooses an expert twice
        assert bool((ids[:, 0] != ids[:, 1]).all())
        counts = ids.flatten().bincount(minlength=experts)
        if load == "uniform":
            assert int(counts.min()) > tokens * top_k / experts / 2
        else:
            assert int(counts.max()) > 2 * tokens * top_k / experts
            assert int(counts[0]) == int(counts.max())


def test_loads_from_a_file(tmp_path):
    path = tmp_path / "ids.pt"
    wanted = torch.tensor([[1, 0], [2, 1], [0, 2], [1, 2], [2, 0], [0, 1], [1, 0]])
    torch.save(wanted, path)
    assert torch.equal(_kernel_sides.draw_ids(str(path), 6, 3, 2), wanted[:6])
    for sizes in ((8, 3, 2), (6, 2, 2), (6, 3, 1)):
        with pytest.raises(KernelError, match="--load"):
            _kernel_sides.draw_ids(str(path), *sizes)
    with pytest.raises(KernelError, match="zipf"):
        _kernel_sides.draw_ids("zpif", 6, 3, 2)


@pytest.mark.parametrize("load", ["zipf", "one", "file"])
def test_a_load_is_part_of_the_rows(load, tmp_path):
    if load == "file":
        load = str(tmp_path / "ids.pt")
        torch.save(torch.tensor([[1, 0], [2, 1], [0, 2]] * 2), load)
    path = tmp_path / "rows.json"
    kernels.main([*SMALL, "--operator", "lora_experts", "--load", load, "--json", str(path)])
    assert {row["load"] for row in json.loads(path.read_text())} == {load}


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="pip install matplotlib"):
        kernels.plot([], str(tmp_path / "plot.png"))


def test_roofline_rows():
    operators = ("lora_experts", "lora_linear", "topk_gate", "token_gather")
    rows = roofline.rows(256, operators)
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert {row["operator"] for row in rows} == set(operators)
    assert all(row["modelled_us"] > 0 and row["bytes_over_minimum"] > 0.99 for row in rows)
