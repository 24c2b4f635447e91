"""The roofline's byte count against a traced run. Run by test_interpreter.py in a process of its own."""

import os

import pytest
import torch
from moe_kit_kernels import roofline, route_plan, tuning
from moe_kit_kernels.grouped_mm import launch, launch_sums
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"


@pytest.fixture
def traced(monkeypatch):
    """Count the bytes of floating-point elements that programs load and store."""
    counted = {"bytes": 0}

    def count(pointers, mask):
        element = pointers.get_element_ty()
        if element.is_floating():
            counted["bytes"] += int(mask.data.sum()) * element.primitive_bitwidth // 8

    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def traced_load(self, pointers, mask, *rest):
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def traced_store(self, pointers, value, mask, *rest):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", traced_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", traced_store)
    return counted


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_bytes_of_a_product(gated, keep, traced):
    ids = torch.tensor([[0, 1], [0, 2], [2, 0], [3, 0]] * 5)
    plan, D, O = route_plan(ids, 5), 40, 72
    x, weight = torch.randn(20, D), torch.randn(5, O * (2 if gated else 1), D)
    tiles = launch.plan_tiles(plan)
    activation = "silu" if gated else None
    launch.product(x, weight, plan, tiles, gather=True, activation=activation, gated=gated, keep=keep)
    sizes = {"width_in": D, "width_out": O, "rows": tiles.rows, "gated": gated, "itemsize": 4}
    tile = tuning.lookup("grouped_mm", x.device, **sizes)
    runs = [run.tolist() for run in plan.sorted_token_P.split(plan.counts_E.tolist())]
    cost = roofline.product_cost(
        runs, D, O, rows=tiles.rows, BN=tile["BN"], group=tile["GROUP"], gated=gated, keep=keep, itemsize=4
    )
    assert traced["bytes"] == cost.l2_bytes


def test_bytes_of_the_sum(traced):
    plan = route_plan(torch.tensor([[0, 1], [0, 2], [2, 0]]), 3)
    launch_sums.combine(torch.randn(6, 40), plan, torch.rand(6))
    # the trace counts floating-point elements, so not the 8 bytes of a pair's index
    assert traced["bytes"] == roofline.combine_cost(3, 6, 40, itemsize=4).l2_bytes - 6 * 8
