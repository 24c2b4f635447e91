"""`gate` chooses as a stable sort does, on each of the ways it takes for different sizes."""

import math

import pytest
import torch
from moe_kit_kernels.topk_gate.cpu import gate

from tests.tolerances import assert_close

SIZES = {
    "a few rows": (2, 8, 2),
    "short rows": (40, 8, 2),
    "long rows": (10, 40, 2),
    "many rows": (700, 8, 2),
    "many long rows": (100, 64, 4),
    "many experts a token": (100, 64, 6),
    "all experts": (40, 4, 4),
}


@pytest.mark.parametrize("kind", ["distinct", "ties", "few finite", "nan"])
@pytest.mark.parametrize(("T", "E", "k"), SIZES.values(), ids=SIZES)
def test_chooses_as_a_stable_sort(T, E, k, kind):
    logits = torch.randn(T, E)
    if kind == "ties":
        logits = logits.round()
    elif kind == "few finite":
        logits[T // 2, 1:] = -math.inf
    elif kind == "nan":
        logits[T // 2, E // 2] = math.nan
    ids, weights = gate(logits, k)
    expected = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, expected.indices[:, :k])
    assert ids.is_contiguous()
    assert_close("weights", weights.nan_to_num(2.0), expected.values[:, :k].softmax(-1).nan_to_num(2.0))
