"""The roofline's byte counts against a traced run. Run by test_interpreter.py in a process of its own."""

import os

import pytest
import torch
from moe_kit_kernels import roofline, route_plan, tuning
from moe_kit_kernels.grouped_mm import launch, launch_sums, sizes
from moe_kit_kernels.lora_experts import launch as lora
from moe_kit_kernels.lora_experts import tiles as lora_tiles
from moe_kit_kernels.lora_grouped import triton as lora_grouped
from moe_kit_kernels.route_plan import tile_height
from moe_kit_kernels.token_gather import triton as compaction
from moe_kit_kernels.topk_gate.triton_autograd import TritonGate
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"

IDS = torch.tensor([[0, 1], [0, 2], [2, 0], [3, 0]] * 5)


@pytest.fixture
def traced(monkeypatch):
    """Count the bytes of floating-point elements that programs load and store."""
    counted = {"bytes": 0, "with integers": 0}

    def count(pointers, mask):
        element = pointers.get_element_ty()
        moved = int(mask.data.sum()) * element.primitive_bitwidth // 8
        counted["with integers"] += moved
        if element.is_floating():
            counted["bytes"] += moved

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


def runs_of(plan, by_token):
    rows = plan.sorted_token_P if by_token else torch.arange(plan.num_pairs)
    return [run.tolist() for run in rows.split(plan.counts_E.tolist())]


def tile_of(kernel, tiles, D, O, gated=False):
    config = {"width_in": D, "width_out": O, "rows": tiles.rows, "gated": gated, "itemsize": 4}
    tile = tuning.lookup(kernel, torch.device("cpu"), **config)
    BN = sizes.product_tile(tile, O)["BN"] if kernel == "grouped_mm" else tile["BN"]
    return {"rows": tiles.rows, "BN": BN, "group": tile["GROUP"], "itemsize": 4}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_product(gated, keep, traced):
    plan, D, O = route_plan(IDS, 5), 40, 72
    x, weight = torch.randn(20, D), torch.randn(5, O * (2 if gated else 1), D)
    tiles = launch.plan_tiles(plan)
    activation = "silu" if gated else None
    launch.product(x, weight, plan, tiles, gather=True, activation=activation, gated=gated, keep=keep)
    tile = tile_of("grouped_mm", tiles, D, O, gated)
    cost = roofline.product_cost(runs_of(plan, True), D, O, **tile, gated=gated, keep=keep)
    assert traced["bytes"] == cost.l2_bytes


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("O", [3, 16, 40])
def test_narrow_product(O, by_token, traced):
    plan, D = route_plan(IDS, 5), 72
    tiles = launch.plan_tiles(plan, by_token=by_token)
    launch.product(torch.randn(20, D), torch.randn(5, O, D), plan, tiles, gather=True, scatter=True)
    cost = roofline.product_cost(runs_of(plan, True), D, O, **tile_of("grouped_mm", tiles, D, O), by_token=by_token)
    assert traced["bytes"] == cost.l2_bytes


@pytest.mark.parametrize("gated", [False, True])
def test_step_through_the_activation(gated, traced):
    plan, D, H = route_plan(IDS, 5), 40, 72
    tiles = launch.plan_tiles(plan)
    z = torch.randn(40, H * (2 if gated else 1))
    more = {"gather": True, "activation": "silu", "gated": gated}
    launch.through_activation(torch.randn(20, D), torch.randn(5, D, H), z, torch.rand(40), plan, tiles, **more)
    tile = tile_of("grouped_mm_dact", tiles, D, H, gated)
    cost = roofline.product_cost(runs_of(plan, True), D, H, **tile, gated=gated, through=True)
    assert traced["bytes"] == cost.l2_bytes


def test_low_rank_continuation(traced):
    plan, D, O, L = route_plan(IDS, 5), 40, 72, 8
    x, W, H, B = torch.randn(20, D), torch.randn(5, O, D), torch.randn(40, L), torch.randn(5, O, L)
    lora_grouped.product(x, W, H, B, plan, True, False)
    tile = tile_of("lora_grouped", launch.plan_tiles(plan), D, O)
    assert traced["bytes"] == roofline.product_cost(runs_of(plan, True), D, O, **tile, rank=L).l2_bytes


@pytest.mark.parametrize("least", [4, 512])
@pytest.mark.parametrize(("O", "D"), [(16, 140), (140, 16), (40, 72)])
def test_weight_gradient(least, O, D, traced, monkeypatch):
    monkeypatch.setattr(sizes, "LEAST_CHUNK", least)
    plan = route_plan(IDS, 5)
    launch_sums.gram(torch.randn(40, O), torch.randn(20, D), torch.empty(5, O, D), plan, gather_x=True)
    tile = tuning.lookup(
        "grouped_gram", torch.device("cpu"), width_in=D, width_out=O, rows=tile_height(40, 5), gated=False, itemsize=4
    )
    tile = {key: sizes.gram_tile(tile, O, D)[key] for key in ("BO", "BD", "BR")}
    cost = roofline.gram_cost(runs_of(plan, False), runs_of(plan, True), O, D, **tile, chunk=least, itemsize=4)
    assert traced["bytes"] == cost.l2_bytes
    assert cost.launches == (2 if least == 4 else 1)


def test_sum(traced):
    plan = route_plan(torch.tensor([[0, 1], [0, 2], [2, 0]]), 3)
    launch_sums.combine(torch.randn(6, 40), plan, torch.rand(6))
    # the trace counts floating-point elements, so not the 8 bytes of a pair's index
    assert traced["bytes"] == roofline.combine_cost(3, 6, 40, itemsize=4).l2_bytes - 6 * 8


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("E", "L"), [(5, 3), (20, 16)])
def test_lora_down(backward, E, L, traced):
    plan, D = route_plan(IDS, E), 70
    more = {"weights": torch.rand(20, 2), "kept_PL": torch.randn(40, L)} if backward else {}
    lora.down_dense(torch.randn(20, D), torch.randn(E, L, D), plan, **more)
    EB, LP = lora_tiles.column_block(E, L)
    tile = {"BM": lora_tiles.down_tile(20, E, L, 4)["BM"], "EB": EB, "LP": LP, "slots": 2, "itemsize": 4}
    assert traced["bytes"] == roofline.down_dense_cost(20, 40, D, E, L, **tile, backward=backward).l2_bytes


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("E", "L"), [(5, 3), (20, 16)])
def test_lora_up(linear, weighed, E, L, traced):
    plan, O, D = route_plan(IDS, E), 150, 70
    base = None if linear else torch.randn(20, O)
    inside = (torch.randn(20, D), torch.randn(O, D), None) if linear else None
    more = {"weights": torch.rand(20, 2) if weighed else None, "base_TO": base, "linear": inside}
    lora.up_dense(torch.randn(40, L), torch.randn(E, O, L), plan, torch.float32, **more)
    BC, LP = lora_tiles.up_columns(E, L, 4)
    tile = lora_tiles.up_tile(20, O, 2, linear=linear, capability=0, itemsize=4)
    tile = {"BM": tile["BM"], "BN": tile["BN"], "BC": BC, "LP": LP, "slots": 2, "itemsize": 4}
    options = {"weighed": weighed, "base": not linear, "linear": D if linear else 0}
    assert traced["bytes"] == pytest.approx(roofline.up_dense_cost(20, 40, O, E, L, **tile, **options).l2_bytes)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("bytes_of_y", [1, 24 << 20])
def test_lora_up_sorted(base, bytes_of_y, traced, monkeypatch):
    monkeypatch.setattr(lora_tiles, "L2_BYTES", bytes_of_y)
    plan, E, O, L = route_plan(IDS, 5), 5, 150, 16
    more = {"weights": torch.rand(20, 2), "base_TO": torch.randn(20, O) if base else None}
    lora.up_sorted(torch.randn(40, L), torch.randn(E, O, L), plan, torch.float32, **more)
    slots = [runs_of(part, True) for part in plan.slot_plans]
    rows = tile_height(20, E)
    tile = lora_tiles.sorted_tile(rows, L, 4)
    width = lora_tiles.group_columns(20, 4, tile["BN"])
    options = {"rows": rows, "BN": tile["BN"], "BL": tile["BL"], "width": width, "base": base, "itemsize": 4}
    cost = roofline.up_sorted_cost(slots, O, L, **options)
    assert traced["bytes"] == cost.l2_bytes
    assert cost.launches == 2 * (3 if bytes_of_y == 1 else 1)


def test_compaction(traced):
    x, index, weights = torch.randn(20, 40), torch.tensor([1, 4, 9, -1, -1]), torch.rand(20)
    packed = compaction.gather(x, index)
    assert traced["bytes"] == roofline.gather_cost(5, 3, 40, itemsize=4).l2_bytes
    traced["bytes"] = 0
    compaction.scatter(packed, index, x, 20, weights)
    assert traced["bytes"] == roofline.scatter_cost(20, 3, 40, itemsize=4).l2_bytes
    traced["bytes"] = 0
    compaction.scatter_backward(x, packed, index, weights, True, True)
    assert traced["bytes"] == roofline.scatter_backward_cost(5, 3, 40, itemsize=4).l2_bytes


@pytest.mark.parametrize(("T", "K", "E"), [(70, 2, 8), (37, 3, 60)])
@pytest.mark.parametrize("bias", [False, True])
def test_gate(T, K, E, bias, traced):
    logits = torch.randn(T, E, requires_grad=True)
    _, weights, _ = TritonGate.apply(logits, torch.randn(E) if bias else None, K, "softmax", True, 1.0)
    assert traced["with integers"] == roofline.gate_cost(T, K, E, bias=bias).l2_bytes
    traced["with integers"] = 0
    weights.sum().backward()
    assert traced["with integers"] == roofline.gate_backward_cost(T, K, E).l2_bytes
