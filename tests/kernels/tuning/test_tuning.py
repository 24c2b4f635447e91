import json

import pytest
import torch
from moe_kit_kernels import KernelError, tuning, warm_up

CPU = torch.device("cpu")
SIZES = {"width_in": 2048, "width_out": 768}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv(tuning.PIN, raising=False)
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


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


@pytest.mark.parametrize("text", ["grouped_mm:BN", "grouped_mm:BN=wide", "grouped_mm:BX=32"])
def test_unreadable_pins_are_errors(text, monkeypatch):
    monkeypatch.setenv(tuning.PIN, text)
    with pytest.raises(KernelError, match=tuning.PIN):
        tuning.lookup("grouped_mm", CPU, **SIZES, rows=64, gated=False)


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_candidates_fit_and_differ(rows, gated):
    for kernel in ("grouped_mm", "grouped_gram"):
        found = tuning.candidates(kernel, rows, 2, gated, 101376)
        assert found
        assert len({json.dumps(c, sort_keys=True) for c in found}) == len(found)
        assert all(tuning.shared_bytes(c, rows, 2, gated) <= 101376 for c in found)


def test_warm_up_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(KernelError, match="CUDA"):
        warm_up(tokens=64, experts=4, top_k=2, width=64, hidden=64)
