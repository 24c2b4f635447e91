"""The planning kernels give what the plain operations give, number for number.

Run by test_interpreter.py in a process of its own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from moe_kit_kernels.route_plan import plan as plans
from moe_kit_kernels.route_plan import route_plan, route_plan_pairs, slot_tile_maps, tile_map, tiles
from moe_kit_kernels.route_plan import triton as kernels

from tests.kernels.planted import plant

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"

SORTED = ("counts_E", "offsets_E1", "order_P", "inverse_P", "sorted_token_P", "sorted_expert_P")
# T, K, E
SIZES = [(0, 2, 3), (1, 1, 1), (20, 3, 5), (20, 1, 9), (17, 2, 20)]


def table(T, K, E, kind):
    generator = torch.Generator().manual_seed(T * K + E)
    ids = torch.randint(0, E, (T, K), generator=generator)
    if kind == "some dropped":
        ids[torch.rand(T, K, generator=generator) < 0.3] = -1
    if kind == "all dropped":
        ids[:] = -1
    if kind == "one hot":
        ids[torch.rand(T, K, generator=generator) < 0.8] = E - 1
    return ids


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 pairs and a scan of a few numbers, so that few pairs make many blocks."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "_SCANNED", 16)
    monkeypatch.setattr(kernels, "_TILES", 4)
    monkeypatch.setattr(kernels, "_OTHERS", 8)


def both(monkeypatch, build):
    """What a function of nothing gives with the plain operations and with the kernels."""
    plain = build()
    with monkeypatch.context() as patch:
        patch.setattr(plans, "on_kernels", lambda plan: True)
        patch.setattr(tiles, "on_kernels", lambda plan: True)
        return plain, build()


def same_tiles(actual, expected):
    assert torch.equal(actual.expert_G, expected.expert_G)
    assert actual.expert_G.dtype is torch.int32
    used = expected.expert_G >= 0
    for name in ("start_G", "end_G"):
        # unused entries are not read
        assert torch.equal(getattr(actual, name)[used], getattr(expected, name)[used]), name


@pytest.mark.parametrize("kind", ["usual", "some dropped", "all dropped", "one hot"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tables(sizes, kind, small, monkeypatch, poison_empty):
    T, K, E = sizes
    ids = table(T, K, E, kind)

    def build():
        plan = route_plan(ids, E)
        pieces = {name: getattr(plan, name) for name in SORTED}
        each = [{name: getattr(part, name) for name in SORTED} for part in plan.slot_plans]
        lists = [tile_map(plan, rows, by_token=order) for rows in (1, 4) for order in (False, True)]
        return pieces, each, lists, [found for _, found in slot_tile_maps(plan, 4)]

    plain, ours = both(monkeypatch, build)
    for name, value in plain[0].items():
        assert torch.equal(ours[0][name], value), name
        assert ours[0][name].dtype is value.dtype
    assert len(ours[1]) == len(plain[1]) == K
    for mine, theirs in zip(ours[1], plain[1], strict=True):
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), name
    for mine, theirs in zip([*ours[2], *ours[3]], [*plain[2], *plain[3]], strict=True):
        same_tiles(mine, theirs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_free_pairs(sizes, small, monkeypatch, poison_empty):
    T, K, E = sizes
    expert = table(T, K, E, "some dropped").reshape(-1)
    # also tokens that do not exist
    token = torch.randint(0, T + 2, (T * K,), generator=torch.Generator().manual_seed(3))

    def build():
        plan = route_plan_pairs(token, expert, T, E)
        return {name: getattr(plan, name) for name in SORTED}, tile_map(plan, 4, by_token=True)

    plain, ours = both(monkeypatch, build)
    for name, value in plain[0].items():
        assert torch.equal(ours[0][name], value), name
    same_tiles(ours[1], plain[1])


def test_blocks_of_their_real_size(monkeypatch, poison_empty):
    ids = table(300, 2, 8, "some dropped")
    plain, ours = both(monkeypatch, lambda: [getattr(route_plan(ids, 8), name) for name in SORTED])
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_three_launches_sort_a_table_and_all_its_slots(monkeypatch):
    launched = []
    for name in ("count_pairs", "scan_counts", "place_pairs", "list_tiles", "order_tiles"):
        kernel = getattr(kernels, f"{name}_kernel")
        watched = type("Watched", (), {"__getitem__": lambda _, grid, k=kernel, n=name: launched.append(n) or k[grid]})
        monkeypatch.setattr(kernels, f"{name}_kernel", watched())
    monkeypatch.setattr(plans, "on_kernels", lambda plan: True)
    monkeypatch.setattr(tiles, "on_kernels", lambda plan: True)
    plan = route_plan(table(20, 2, 4, "usual"), 4)
    for name in SORTED:
        getattr(plan, name)
    tile_map(plan, 16, by_token=True)
    slot_tile_maps(plan, 16)
    slot_tile_maps(plan, 16)
    # what `cost_model` charges for work lists and slot lists
    assert launched == ["count_pairs", "scan_counts", "place_pairs", "list_tiles", "order_tiles", "list_tiles"]


def test_where_the_kernels_serve(monkeypatch):
    assert not plans.on_kernels(route_plan(table(4, 1, 3, "usual"), 3)), "the CPU has the plain operations"
    fake = type("Plan", (), {"num_experts": 1023, "num_pairs": 8, "device": torch.device("cuda")})
    assert plans.on_kernels(fake)
    for name, value in (("num_experts", 1024), ("num_pairs", 2**31), ("device", torch.device("cpu"))):
        assert not plans.on_kernels(type("Plan", (fake,), {name: value}))
    assert plans.MAX_EXPERTS == 1023


# each keeps its writes inside the arrays
BUGS = {
    "pairs of other blocks": ("place_pairs_kernel", "count_ptr + count_at + block * EP", "count_ptr + count_at + 0 * EP"),
    "unstable": ("place_pairs_kernel", "(other[None, :] < local[:, None])", "(other[None, :] > local[:, None])"),
    "one pair short": ("count_pairs_kernel", "mask=pair < size)\n    tl.store", "mask=pair < size - 1)\n    tl.store"),
    "sums of one step": ("scan_counts_kernel", "running[None, :] + tl.cumsum", "tl.cumsum"),
    "slots of the table": ("place_pairs_kernel", "tl.where(step > 1, pair, pair // slots)", "pair // slots"),
    "equal experts swapped": ("list_tiles_kernel", "(expert < group)", "(expert > group)"),
    "last tile too long": ("list_tiles_kernel", "tl.minimum(begin + ROWS, last)", "begin + ROWS"),
    "unused entries are tiles": ("list_tiles_kernel", "(nothing - 1).to", "nothing.to"),
    "dropped rows first": ("order_tiles_kernel", "expert == num_experts, num_tokens, token", "expert == num_experts, -1, token"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_seen(name, small, tmp_path, monkeypatch):
    plant(BUGS[name], kernels, kernels.__file__, tmp_path, monkeypatch)
    # experts 2 and 3 have as many pairs, the others more, and every third slot of a fifth of the tokens is empty
    ids = torch.stack([torch.tensor([t % 5, (t + 1) % 5, -1 if t % 5 == 0 else t * t % 5]) for t in range(40)])

    def build():
        plan = route_plan(ids, 5)
        pieces = [getattr(part, piece) for part in (plan, *plan.slot_plans) for piece in SORTED]
        lists = [tile_map(plan, rows, by_token=order) for rows in (4, 16) for order in (False, True)]
        used = [found.expert_G >= 0 for found in lists]
        rows = [part[use] for found, use in zip(lists, used) for part in (found.start_G, found.end_G)]
        return [*pieces, *(found.expert_G for found in lists), *rows]

    plain, ours = both(monkeypatch, build)
    assert not all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
