import pytest
from moe_kit_kernels.roofline import (
    A100,
    H100,
    Cache,
    Cost,
    compaction_designs,
    gate_designs,
    gram_cost,
    grouped_lora_designs,
    linear_designs,
    lora_designs,
    mlp_designs,
    product_cost,
    seconds,
    up_sorted_cost,
)


def test_cache_evicts_the_oldest():
    cache = Cache(2)
    for key in "abab":
        cache.read(key, 1)
    assert cache.moved == 2
    cache.read("c", 1)
    cache.read("b", 1)
    assert cache.moved == 3
    cache.read("a", 1)
    assert cache.moved == 4


def test_written_entries_go_back_once():
    cache = Cache(2)
    cache.write("a", 1)
    cache.write("a", 1)
    assert cache.moved == 0
    cache.read("b", 1)
    cache.read("c", 1)
    assert cache.moved == 3
    assert cache.flush() == 3


def test_everything_cached_reads_each_operand_once():
    runs = [list(range(100)), list(range(50, 150))]
    cost = product_cost(runs, 64, 96, rows=16, BN=32, group=4, itemsize=2)
    assert cost.hbm_bytes == 2 * (150 * 64 + 2 * 96 * 64 + 200 * 96)
    tiny = product_cost(runs, 64, 96, rows=16, BN=32, group=4, itemsize=2, cache=1)
    assert cost.hbm_bytes < tiny.hbm_bytes <= tiny.l2_bytes


def test_a_block_of_y_stays_in_cache_between_slots():
    slots = [[list(range(256))], [list(range(256))]]
    more = {"rows": 16, "BN": 64, "BL": 16, "base": False, "weighed": False}
    grouped = up_sorted_cost(slots, 1024, 16, **more, width=64, cache=120_000)
    whole = up_sorted_cost(slots, 1024, 16, **more, width=1024, cache=120_000)
    y = 256 * 1024 * 2
    assert grouped.l2_bytes == whole.l2_bytes
    assert grouped.hbm_bytes < 1.6 * y
    assert whole.hbm_bytes > 2.9 * y


def test_tiles_by_token_read_x_once():
    # two experts read every token; the cache holds a few tiles and both matrices
    runs = [list(range(512)), list(range(512))]
    more = {"rows": 16, "BN": 16, "group": 1, "cache": 60_000}
    by_expert, by_token = (product_cost(runs, 256, 16, **more, by_token=order) for order in (False, True))
    weights_and_result = 2 * 16 * 256 * 2 + 1024 * 16 * 2
    assert by_token.hbm_bytes == 512 * 256 * 2 + weights_and_result
    assert by_expert.hbm_bytes == 1024 * 256 * 2 + weights_and_result
    assert by_token.l2_bytes == by_expert.l2_bytes


def test_split_gradient_pays_for_its_parts():
    runs = [list(range(1024)), []]
    whole, split = (gram_cost(runs, runs, 16, 256, BO=16, BD=128, BR=64, chunk=chunk) for chunk in (1024, 256))
    assert (whole.launches, split.launches) == (1, 2)
    # four parts written and read instead of one gradient written, which is written after all
    assert split.l2_bytes - whole.l2_bytes == 16 * 256 * (4 * 4 + 4 * 4)


def test_slowest_resource_bounds():
    assert Cost(H100.hbm, 0, 0).seconds(H100) == 1
    assert Cost(0, 2 * H100.l2, H100.flops).seconds(H100) == 2
    assert seconds([Cost(0, 0, A100.flops), Cost(0, 0, A100.flops)], A100) == 2


def times(designs, device):
    return {name: seconds(kernels, device) for name, kernels in designs.items()}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", [H100, A100])
def test_order_of_the_designs(device, backward):
    more = {"device": device, "backward": backward}
    costs = mlp_designs(1024, 4, 16, 512, 256, **more)
    modelled = times(costs, device)
    assert modelled["minimum"] < modelled["moe_kit"] < modelled["sort + scatter + combine"]
    assert modelled["sort + scatter + combine"] < modelled["loop over experts"]
    ours, theirs = (sum(k.hbm_bytes for k in costs[name]) for name in ("moe_kit", "sort + scatter + combine"))
    assert ours < theirs
    for designs in (
        lora_designs(1024, 2, 8, 8, 512, 512, **more),
        linear_designs(1024, 2, 8, 8, 512, 512, **more),
        grouped_lora_designs(1024, 2, 8, 8, 512, 512, **more),
        compaction_designs(1024, 0.5, 512, **more),
        gate_designs(1024, 8, 128, **more),
    ):
        modelled = times(designs, device)
        assert all(modelled["minimum"] <= other for other in modelled.values()), modelled


@pytest.mark.parametrize("backward", [False, True])
def test_gating_moves_about_the_minimum(backward):
    for K, E in ((2, 8), (8, 64), (8, 128)):
        designs = gate_designs(16384, K, E, backward=backward)
        least, ours, plain = (sum(k.hbm_bytes for k in kernels) for kernels in designs.values())
        # the rest are partial counts, written and read: 8 bytes for an expert every 1024 / E tokens
        assert ours <= 1.43 * least
        assert plain > 1.5 * ours


@pytest.mark.parametrize("device", [H100, A100])
@pytest.mark.parametrize(
    ("E", "L"), [(8, 8), (8, 16), (16, 16), (8, 32), (32, 8), (8, 64), (16, 32), (32, 16), (64, 8)]
)
def test_what_auto_runs_moves_the_minimum_and_beats_the_masked_pair(device, E, L):
    designs = lora_designs(16384, 2, E, L, 4096, 4096, device=device)
    auto = next(name for name in designs if name.startswith("moe_kit ("))
    least, ours = (sum(k.hbm_bytes for k in designs[name]) for name in ("minimum", auto))
    assert ours <= 1.25 * least
    modelled = times(designs, device)
    assert modelled[auto] <= modelled["masked GEMM pair"]
    # what the cost model took is the best that we have, within what its sizes can tell
    assert modelled[auto] <= 1.05 * min(modelled[f"moe_kit {how}"] for how in ("dense", "mixed", "sorted"))


@pytest.mark.parametrize("device", [H100, A100])
def test_sorted_lora_beats_read_modify_writes(device):
    modelled = times(lora_designs(16384, 2, 64, 64, 4096, 4096, device=device), device)
    assert modelled["moe_kit (sorted)"] <= 0.85 * modelled["sorted down + k read-modify-writes"]
