"""Shared test set-up: one thread count, poisoned allocations, fixed seeds."""

import os
import signal

# started in the background, a shell has the keyboard's signal ignored; tests of Ctrl-C send it themselves
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poison_empty(monkeypatch):
    """Fill `torch.empty*` with NaN so that a row which nobody writes is seen."""

    def poisoned(function):
        def wrapper(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-(2**30))

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
