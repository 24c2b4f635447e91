import pytest
from moe_kit_kernels.roofline import A100, H100, Cache, Cost, block_costs, product_cost, seconds


def test_cache_evicts_the_oldest():
    cache = Cache(2)
    for key in "abab":
        cache.touch(key, 1)
    assert cache.missed == 2
    cache.touch("c", 1)
    cache.touch("b", 1)
    assert cache.missed == 3
    cache.touch("a", 1)
    assert cache.missed == 4


def test_everything_cached_reads_each_operand_once():
    runs = [list(range(100)), list(range(50, 150))]
    cost = product_cost(runs, 64, 96, rows=16, BN=32, group=4, itemsize=2)
    assert cost.hbm_bytes == 2 * (150 * 64 + 2 * 96 * 64 + 200 * 96)
    tiny = product_cost(runs, 64, 96, rows=16, BN=32, group=4, itemsize=2, cache=1)
    assert cost.hbm_bytes < tiny.hbm_bytes <= tiny.l2_bytes


def test_slowest_resource_bounds():
    assert Cost(H100.hbm, 0, 0).seconds(H100) == 1
    assert Cost(0, 2 * H100.l2, H100.flops).seconds(H100) == 2
    assert seconds([Cost(0, 0, A100.flops), Cost(0, 0, A100.flops)], A100) == 2


@pytest.mark.parametrize("device", [H100, A100])
def test_order_of_the_designs(device):
    costs = block_costs(1024, 4, 16, 512, 256, device=device)
    times = {name: seconds(kernels, device) for name, kernels in costs.items()}
    assert times["minimum"] < times["moe_kit"] < times["sort + scatter + combine"] < times["loop over experts"]
    ours = sum(kernel.hbm_bytes for kernel in costs["moe_kit"])
    theirs = sum(kernel.hbm_bytes for kernel in costs["sort + scatter + combine"])
    assert ours < theirs
