"""Planted bugs: each class of mistake in a kernel must turn the comparison with the reference red.

Run by test_interpreter.py in a process of its own with TRITON_INTERPRET=1.
"""

import os
from pathlib import Path

import pytest
import torch
from moe_kit_kernels import experts_mlp, lora_grouped, route_plan, token_gather, token_scatter
from moe_kit_kernels.grouped_mm import launch, launch_sums, sizes
from moe_kit_kernels.lora_grouped import triton as lora_grouped_triton
from moe_kit_kernels.token_gather import triton as token_triton

from tests.kernels.planted import plant
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


LORA_GROUPED_BUGS = {
    "row mask one short": ("lora_grouped_kernel", "    mask_m = rows < end\n", "    mask_m = rows < end - 1\n"),
    "one row late": ("lora_grouped_kernel", "rows = start + tl.arange(", "rows = start + 1 + tl.arange("),
    "column mask one short": ("lora_grouped_kernel", "    mask_n = offs_n < O\n", "    mask_n = offs_n < O - 1\n"),
    "wrong expert's base": ("lora_grouped_kernel", "w_ptr + expert.to(", "w_ptr + (expert * 0).to("),
    "wrong expert's B": ("lora_grouped_kernel", "b_ptr + expert.to(", "b_ptr + (expert * 0).to("),
    "wrong row of h": ("lora_grouped_kernel", "h_ptr + rows.to(", "h_ptr + source.to("),
    "no gather": ("lora_grouped_kernel", "        if GATHER:\n", "        if GATHER and BM > 999:\n"),
    "no scatter": ("lora_grouped_kernel", "    if SCATTER:\n", "    if SCATTER and BM > 999:\n"),
    "rank one short": ("lora_grouped_kernel", "mask_m, mask_n, L, 1,", "mask_m, mask_n, L - 1, 1,"),
    "dropped rows left": (
        "lora_grouped_kernel",
        "    y = tl.zeros((BM, BN), dtype=tl.float32)\n",
        "    y = tl.zeros((BM, BN), dtype=tl.float32) + (expert >= num_experts)\n",
    ),
}
TOKEN_BUGS = {
    "no zeros for unused slots": ("gather_rows_kernel", "& used, other=0.0)", "& used, other=1.0)"),
    "first row for unused slots": (
        "gather_rows_kernel",
        "x_ptr + source * stride_x + offs, mask=(offs < D) & used",
        "x_ptr + tl.maximum(source, 0) * stride_x + offs, mask=offs < D",
    ),
    "tail not written": ("gather_rows_kernel", "offs, x, mask=offs < D)", "offs, x, mask=offs < D - 1)"),
    "wrong row": ("gather_rows_kernel", "x_ptr + source * stride_x", "x_ptr + row * stride_x"),
    "no base": ("add_rows_kernel", "    if BASE:\n", "    if BASE and BN > 9999:\n"),
    "weight of a token without a slot": (
        "add_rows_kernel",
        "        y = tl.where(used, y * tl.load(weight_ptr + token).to(tl.float32), 0.0)\n",
        "        y = y * tl.load(weight_ptr + token).to(tl.float32)\n",
    ),
    "weight of the slot": ("add_rows_kernel", "tl.load(weight_ptr + token)", "tl.load(weight_ptr + slot)"),
    "no weight backward": ("add_rows_backward_kernel", "(dy * weight).to(", "dy.to("),
    "weight of the slot backward": ("add_rows_backward_kernel", "tl.maximum(source, 0)).to", "row).to"),
    "first block only": ("add_rows_backward_kernel", "            total += dy *", "            total = dy *"),
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
    module = launch if hasattr(launch, BUGS[bug][0]) else launch_sums
    file = Path(launch.__file__).with_name("triton.py" if module is launch else "triton_sums.py")
    plant(BUGS[bug], module, file, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        compare()


def compare_lora_grouped():
    # ranks and widths beside a tile; an expert without rows, dropped slots
    plan = route_plan(torch.tensor([[0, 3], [3, 0], [0, -1], [2, 3], [4, 7]]), 5)
    tensors = {
        "x": torch.randn(5, 21),
        "weight_EOD": torch.randn(5, 18, 21) / 21**0.5,
        "A_ELD": torch.randn(5, 5, 21) / 21**0.5,
        "B_EOL": torch.randn(5, 18, 5) / 5**0.5,
    }
    results = {}
    for backend in ("reference", "triton"):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y = lora_grouped(**leaves, plan=plan, gather=True, scatter=True, scale=0.5, backend=backend)
        y.square().sum().backward()
        results[backend] = {"y": y, **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, expected in results["reference"].items():
        assert_close(name, results["triton"][name], expected)


def compare_tokens():
    # wider than a block of 1024 columns in the backward's loop
    keep_T = torch.tensor([False, True, False, True, True])
    tensors = {"x": torch.randn(5, 1029), "base": torch.randn(5, 1029), "w": torch.linspace(0.5, 2, 5)}
    results = {}
    for backend in ("reference", "triton"):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        x_ND, index_N = token_gather(leaves["x"], keep_T, bound=4, backend=backend)
        weights_T = torch.where(keep_T, leaves["w"], float("nan"))
        y = token_scatter(x_ND * x_ND, index_N, leaves["base"], weights_T=weights_T, backend=backend)
        (y.square().sum() + x_ND[:, -2:].sum()).backward()
        results[backend] = {"gathered": x_ND, "y": y, **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, expected in results["reference"].items():
        assert_close(name, results["triton"][name], expected)


def test_sound_other_kernels_pass(poison_empty):
    compare_lora_grouped()
    compare_tokens()


@pytest.mark.parametrize("bug", LORA_GROUPED_BUGS)
def test_bug_of_lora_grouped_is_caught(bug, tmp_path, monkeypatch, poison_empty):
    plant(LORA_GROUPED_BUGS[bug], lora_grouped_triton, lora_grouped_triton.__file__, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        compare_lora_grouped()


@pytest.mark.parametrize("bug", TOKEN_BUGS)
def test_bug_of_the_token_kernels_is_caught(bug, tmp_path, monkeypatch, poison_empty):
    plant(TOKEN_BUGS[bug], token_triton, token_triton.__file__, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        compare_tokens()
