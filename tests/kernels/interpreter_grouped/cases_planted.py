"""Planted bugs: each class of mistake in a kernel must turn the comparison with the reference red.

Run by test_interpreter.py in a process of its own with TRITON_INTERPRET=1.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from moe_kit_kernels import experts_mlp
from moe_kit_kernels.grouped_mm import launch, launch_sums, sizes

from tests.tolerances import assert_close

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"

# name -> (kernel, text in its source, what replaces it)
BUGS = {
    "row mask one short": ("grouped_mm_kernel", "    mask_m = rows < end\n", "    mask_m = rows < end - 1\n"),
    "column mask one short": ("grouped_mm_kernel", "    mask_n = offs_n < O\n", "    mask_n = offs_n < O - 1\n"),
    "inner mask too long": ("grouped_mm_kernel", "mask_k = offs_k < D - k * BK", "mask_k = offs_k < D - k * BK + 3"),
    "wrong expert": ("grouped_mm_kernel", "w_expert = w_ptr + expert.to(", "w_expert = w_ptr + (expert * 0).to("),
    "no gather": ("grouped_mm_kernel", "        if GATHER:\n", "        if GATHER and BM > 999:\n"),
    "wrong half": ("grouped_mm_kernel", "(offs_n.to(tl.int64) + O) * stride_wo", "offs_n.to(tl.int64) * stride_wo"),
    "unwritten empty expert": (
        "grouped_gram_kernel",
        "    acc = tl.zeros((BO, BD), dtype=tl.float32)\n",
        "    if start == end:\n        return\n    acc = tl.zeros((BO, BD), dtype=tl.float32)\n",
    ),
    "next expert's rows": ("grouped_gram_kernel", "mask_r = rows < end", "mask_r = rows < end + 1"),
    "no gate": ("grouped_mm_dact_kernel", "    dh = t * weight[:, None]\n", "    dh = t\n"),
    "slot order": ("combine_kernel", "last = first + SLOTS", "last = first + SLOTS - 1"),
    "last part left out": ("split_sum_kernel", "for slot in range(first, last)", "for slot in range(first, last - 1)"),
    "parts of one slot": (
        "grouped_gram_kernel",
        "slot = tl.load(slot_ptr + chunk)",
        "slot = tl.load(first_slot_ptr + expert)",
    ),
}


@pytest.fixture(autouse=True)
def split(monkeypatch):
    # chunks of two rows, so that the parts of split experts are seen too
    monkeypatch.setattr(sizes, "LEAST_CHUNK", 2)


def compare():
    ids = torch.tensor([[0, 3], [3, 0], [0, -1], [2, 3], [4, 2], [0, 4]])
    tensors = {
        "x_TD": torch.randn(6, 21),
        "up_EFD": torch.randn(5, 14, 21),
        "down_EDH": torch.randn(5, 21, 7),
        "weights_TK": torch.rand(6, 2),
    }
    results = {}
    for backend in ("reference", "triton"):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y = experts_mlp(**leaves, expert_ids_TK=ids, backend=backend)
        y.square().sum().backward()
        results[backend] = {"y": y, **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, expected in results["reference"].items():
        assert_close(name, results["triton"][name], expected)


def test_sound_kernels_pass(poison_empty):
    compare()


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, tmp_path, monkeypatch, poison_empty):
    kernel, old, new = BUGS[bug]
    module = launch if hasattr(launch, kernel) else launch_sums
    source = Path(launch.__file__).with_name("triton.py" if module is launch else "triton_sums.py").read_text()
    assert old in source, f"the kernel changed: plant {bug!r} anew"
    path = tmp_path / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", path)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(module, kernel, getattr(planted, kernel))
    with pytest.raises((AssertionError, IndexError)):
        compare()
