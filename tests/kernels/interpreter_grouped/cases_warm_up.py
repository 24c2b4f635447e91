"""`warm_up` launches real kernels with every candidate; timer and device are faked. Run by test_interpreter.py."""

import os

import pytest
import torch
from moe_kit_kernels import tuning, warm_up
from moe_kit_kernels.tuning import measure

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"

SIZES = {"tokens": 12, "experts": 2, "top_k": 1, "width": 32, "hidden": 32, "dtype": torch.float32}


@pytest.fixture
def pins(monkeypatch):
    """A GPU that is this CPU, and a timer to which the last candidate is the fastest; collects the pins it saw."""
    seen = []

    def timed(function):
        def run():
            function()
            seen.append(os.environ[tuning.PIN])
            return 1.0 / len(seen)

        return run

    monkeypatch.delenv(tuning.PIN, raising=False)
    monkeypatch.setattr(tuning, "_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuning, "_device", lambda device: ("Fake_GPU", tuning.SHARED_LIMIT["sm_90"]))
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setattr(measure, "_timed", timed)
    tuning.forget()
    yield seen
    tuning.forget()


@pytest.mark.parametrize("rank", [None, 4])
def test_every_kernel_is_launched_with_every_candidate(rank, pins):
    table = warm_up(**SIZES, rank=rank)
    assert tuning.PIN not in os.environ
    kernels = {"grouped_mm", "grouped_mm_dact", "grouped_gram"}
    if rank is not None:
        kernels = {*tuning.LORA, "grouped_mm", "lora_grouped"}
    assert set(table) == kernels
    for kernel, entries in table.items():
        last = [pin for pin in pins if pin.startswith(f"{kernel}:")][-1]
        pinned = dict(pair.split("=") for pair in last.partition(":")[2].split(","))
        # the last of the candidates was the fastest, and its values are the entry's
        assert {key: str(entries[-1][key]) for key in pinned} == pinned
        assert all(entry["itemsize"] == 4 and entry["milliseconds"] > 0 for entry in entries)
        assert rank is None or kernel == "grouped_mm" or entries[-1]["rank"] == rank
