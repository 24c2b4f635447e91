"""`python -m bench kernels` on tiny shapes: sides, rows, comparison with a baseline, and what it refuses."""

import importlib.util
import json

import pytest
import torch
from moe_kit_kernels import KernelError

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


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="pip install matplotlib"):
        kernels.plot([], str(tmp_path / "plot.png"))


def test_roofline_rows():
    rows = roofline.rows(256, ("lora_experts", "lora_linear", "token_gather"))
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert {row["operator"] for row in rows} == {"lora_experts", "lora_linear", "token_gather"}
    assert all(row["modelled_us"] > 0 and row["bytes_over_minimum"] > 0.99 for row in rows)
