import json
import os

import pytest
import torch
from moe_kit_kernels import KernelError, tuning, warm_up
from moe_kit_kernels.lora_experts import tiles
from moe_kit_kernels.tuning.candidates import candidates

CPU = torch.device("cpu")
SIZES = {"width_in": 2048, "width_out": 768}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv(tuning.PIN, raising=False)
    tuning.forget()
    yield
    tuning.forget()


@pytest.mark.parametrize("kernel", ["grouped_mm", "grouped_mm_dact", "grouped_gram", "lora_grouped"])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_defaults_fit_every_device(kernel, rows, itemsize, gated):
    config = tuning.lookup(kernel, CPU, **SIZES, rows=rows, gated=gated, itemsize=itemsize)
    for limit in set(tuning.SHARED_LIMIT.values()):
        fitted = tuning.fit(config, rows, itemsize, gated, limit)
        assert tuning.shared_bytes(fitted, rows, itemsize, gated) <= limit


def test_nearest_entry_of_the_device_wins(tmp_path, monkeypatch):
    default = tuning.lookup("grouped_mm", CPU, **SIZES, rows=64, gated=False)
    entries = [
        {**default, "rows": 64, "width_in": 2048, "width_out": 768, "num_stages": 2},
        {**default, "rows": 64, "width_in": 64, "width_out": 64, "num_stages": 4},
        {**default, "rows": 128, "width_in": 2048, "width_out": 768, "num_stages": 1},
    ]
    (tmp_path / "Test_GPU.json").write_text(json.dumps({"grouped_mm": entries}))
    monkeypatch.setenv(tuning.TABLES, str(tmp_path))
    monkeypatch.setattr(tuning, "_device", lambda device: ("Test_GPU", 232448))
    for width_in, width_out, stages in ((2048, 768, 2), (1024, 1024, 2), (96, 64, 4)):
        found = tuning.lookup("grouped_mm", CPU, width_in=width_in, width_out=width_out, rows=64, gated=False)
        assert found["num_stages"] == stages
        assert "width_in" not in found
    assert tuning.lookup("grouped_mm", CPU, **SIZES, rows=32, gated=False)["num_stages"] == 4


def test_pinned_values(monkeypatch):
    monkeypatch.setenv(tuning.PIN, "grouped_gram:BR=16;grouped_mm:BN=32,num_warps=2")
    config = tuning.lookup("grouped_mm", CPU, **SIZES, rows=64, gated=False)
    assert (config["BN"], config["num_warps"]) == (32, 2)
    assert tuning.lookup("grouped_gram", CPU, **SIZES, rows=64, gated=False)["BR"] == 16


def lora(kernel, default, rank=16, itemsize=2, width_in=4096, width_out=4096):
    more = {"rank": rank, "itemsize": itemsize, "width_in": width_in, "width_out": width_out}
    return tiles.tuned(kernel, CPU, default, rows=128, **more, columns=128)


def test_lora_kernels_take_pins_and_keep_their_defaults(monkeypatch):
    default = tiles.down_tile(16384, 8, 16)
    assert lora("lora_down_dense", default) == default
    monkeypatch.setenv(tuning.PIN, "lora_down_dense:BK=32,num_warps=4;lora_up_sorted:BL=16")
    assert lora("lora_down_dense", default) == {**default, "BK": 32, "num_warps": 4}
    assert lora("lora_up_sorted", tiles.sorted_tile(128, 64))["BL"] == 16
    up = tiles.up_tile(16384, 4096, 2, linear=False, capability=90)
    assert lora("lora_up_dense", up) == up


def test_the_nearest_entry_counts_the_rank(tmp_path, monkeypatch):
    up = tiles.up_tile(16384, 4096, 2, linear=False, capability=90)
    key = {"rows": 128, "width_in": 4096, "width_out": 4096}
    lora_up = [{**up, **key, "rank": rank, "num_warps": warps} for rank, warps in ((8, 1), (64, 2))]
    stack = tuning.lookup("lora_grouped", CPU, **SIZES, rows=128, gated=False)
    stacks = [{**stack, **key, "rank": rank, "num_stages": stages} for rank, stages in ((8, 1), (64, 2))]
    table = {"lora_up_dense": lora_up, "lora_grouped": stacks}
    (tmp_path / "Test_GPU.json").write_text(json.dumps(table))
    monkeypatch.setenv(tuning.TABLES, str(tmp_path))
    monkeypatch.setattr(tuning, "_device", lambda device: ("Test_GPU", 232448))
    for rank, place in ((4, 1), (16, 1), (32, 2), (256, 2)):
        assert lora("lora_up_dense", up, rank)["num_warps"] == place
        found = tuning.lookup("lora_grouped", CPU, **SIZES, rows=128, gated=False, rank=rank)
        assert found["num_stages"] == place
        assert "rank" not in found
    # measured with 2-byte elements: 4-byte ones do not take it
    assert lora("lora_up_dense", up, 8, itemsize=4) == up
    del lora_up[0]["BM"]
    (tmp_path / "Test_GPU.json").write_text(json.dumps(table))
    tuning.forget()
    with pytest.raises(KernelError, match=r"Test_GPU\.json"):
        lora("lora_up_dense", up, 8)


def test_a_wide_bank_is_cut_to_a_small_gpu(monkeypatch):
    monkeypatch.setattr(tuning, "_device", lambda device: ("Small_GPU", tuning.SHARED_LIMIT["sm_120"]))
    more = {"rows": 32, "width_in": 4096, "width_out": 1024, "rank": 256, "itemsize": 2}
    default = tiles.down_tile(16384, 4, 256)
    cut = tiles.tuned("lora_down_dense", CPU, default, **more, columns=256)
    assert tuning.shared_bytes(default, 32, 2, False, 256) > tuning.SHARED_LIMIT["sm_120"]
    assert tuning.shared_bytes(cut, 32, 2, False, 256) <= tuning.SHARED_LIMIT["sm_120"]


def test_only_tensor_memory_holds_tall_linear_tiles():
    heights = {c: tiles.up_tile(16384, 4096, 2, linear=True, capability=c)["BM"] for c in (80, 90, 100, 103, 110, 120)}
    assert heights == {80: 64, 90: 64, 100: 128, 103: 128, 110: 128, 120: 64}


def test_tall_tiles_where_a_banks_width_pays_for_them():
    def tile(columns=256, tokens=16384, slots=2, capability=90, width=4096):
        found = tiles.up_tile(tokens, width, slots, linear=False, capability=capability, columns=columns)
        return found["BM"], found["BN"]

    assert tile() == (256, 64)
    # fewer columns, another architecture, more slots, rows that are not aligned, few tokens
    assert tile(columns=128) == tile(capability=80) == tile(capability=100) == (128, 128)
    assert tile(slots=4) == tile(width=4097) == tile(tokens=256) == (64, 128)
    # what stays in registers: fewer columns for tall tiles, narrow ranks and many slots
    found = {
        (L, rows, slots): tiles.up_columns(16, L, 2, rows, slots)[0]
        for L in (8, 32)
        for rows in (128, 256)
        for slots in (2, 8)
    }
    assert found == {
        (8, 128, 2): 32, (8, 128, 8): 32, (8, 256, 2): 16, (8, 256, 8): 16,
        (32, 128, 2): 64, (32, 128, 8): 32, (32, 256, 2): 32, (32, 256, 8): 32,
    }  # fmt: skip


def test_sorted_tiles_of_few_wide_experts_are_tall():
    rows = {(E, L): tiles.down_rows(32768, E, L) for E in (8, 16) for L in (16, 32, 64, 128)}
    assert rows == {(E, L): 256 if E == 8 and L in (32, 64) else 128 for E in (8, 16) for L in (16, 32, 64, 128)}
    assert tiles.down_rows(32768, 8, 32, itemsize=4) == 128
    assert tiles.down_rows(64, 8, 32) == 16


def test_four_byte_operands_take_shallow_tiles():
    for rows in (16, 32, 64, 128):
        for kernel in ("grouped_mm", "grouped_gram", "lora_grouped"):
            found = tuning.lookup(kernel, CPU, **SIZES, rows=rows, gated=False, itemsize=4)
            assert found.get("BK", found.get("BR")) == 16
    assert (
        tiles.down_tile(16384, 8, 16, 4)["BK"]
        == tiles.up_columns(8, 16, 4)[0]
        == tiles.sorted_tile(128, 64, 4)["BL"]
        == 16
    )


@pytest.mark.parametrize(
    "text", ["grouped_mm:BN", "grouped_mm:BN=wide", "grouped_mm:BX=32", "grouped_nn:BN=32", "BN=32"]
)
def test_unreadable_pins_are_errors(text, monkeypatch):
    monkeypatch.setenv(tuning.PIN, text)
    with pytest.raises(KernelError, match=tuning.PIN):
        tuning.lookup("grouped_mm", CPU, **SIZES, rows=64, gated=False)


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_candidates_fit_and_differ(rows, gated, itemsize):
    for kernel in ("grouped_mm", "grouped_gram"):
        found = candidates(kernel, rows, itemsize, gated, 101376)
        assert len(found) > 1
        assert len({json.dumps(c, sort_keys=True) for c in found}) == len(found)
        assert all(tuning.shared_bytes(c, rows, itemsize, gated) <= 101376 for c in found)


def test_lora_candidates_start_with_the_default():
    down = tiles.down_tile(16384, 8, 16)
    found = candidates("lora_down_dense", 128, 2, False, 232448, default=down, columns=128)
    assert found[0] == down
    assert {c["BM"] for c in found} == {64, 128}
    # the up kernel alone has no tile over the width in to vary
    up = tiles.up_tile(16384, 4096, 2, linear=False, capability=90)
    assert {c["BK"] for c in candidates("lora_up_dense", 128, 2, False, 232448, default=up)} == {up["BK"]}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(tuning, "_gpu", lambda: CPU)
    monkeypatch.setattr(tuning, "_device", lambda device: ("Fake_GPU", 232448))
    monkeypatch.setattr(tuning, "_measured", {})


BLOCK = {"tokens": 4096, "experts": 8, "top_k": 2, "width": 2048, "hidden": 768}


def test_warm_up_takes_the_fastest_and_writes_it(gpu, monkeypatch, tmp_path):
    measure = pytest.importorskip("moe_kit_kernels.tuning.measure", reason="warm_up needs triton")
    seen = []

    def block(best, tokens, experts, top_k, width, hidden, gated, dtype, device):
        def run():
            # what a launch would take at this moment
            tile = tuning.lookup("grouped_mm", device, **SIZES, rows=128, gated=gated)
            seen.append(tile)
            return 1.0 + (tile["BK"] != 32) + tile["num_warps"]

        best("grouped_mm", 128, run, {"width_in": 2048, "width_out": 768}, gated)

    monkeypatch.setattr(measure, "measure_block", block)
    monkeypatch.setenv(tuning.PIN, "grouped_gram:BR=16")
    for _ in range(2):
        table = warm_up(**BLOCK, json_path=tmp_path / "Fake_GPU.json")
    assert os.environ[tuning.PIN] == "grouped_gram:BR=16"
    assert len(seen) == 2 * len(candidates("grouped_mm", 128, 2, True, 232448))
    (entry,) = table["grouped_mm"]
    assert (entry["BK"], entry["num_warps"], entry["milliseconds"], entry["gated"]) == (32, 4, 5.0, True)
    chosen = tuning.lookup("grouped_mm", CPU, width_in=1024, width_out=512, rows=128, gated=True)
    assert (chosen["BK"], chosen["num_warps"]) == (32, 4)
    # another process finds it in the folder
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setenv(tuning.TABLES, str(tmp_path))
    tuning.forget()
    assert tuning.lookup("grouped_mm", CPU, **SIZES, rows=128, gated=True) == chosen


def test_warm_up_that_fails_leaves_no_pin(gpu, monkeypatch):
    measure = pytest.importorskip("moe_kit_kernels.tuning.measure", reason="warm_up needs triton")

    def block(best, *_):
        best("grouped_mm", 128, lambda: 1 / 0, {"width_in": 2048, "width_out": 768}, False)

    monkeypatch.setattr(measure, "measure_block", block)
    with pytest.raises(ZeroDivisionError):
        warm_up(**BLOCK)
    assert tuning.PIN not in os.environ


def test_warm_up_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(KernelError, match="CUDA"):
        warm_up(tokens=64, experts=4, top_k=2, width=64, hidden=64)
