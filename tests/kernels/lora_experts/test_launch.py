"""What launches ask of a device, on a device that is only pretended."""

import pytest
import torch


@pytest.mark.parametrize(("found", "expected"), [((8, 0), 80), ((9, 0), 90), ((12, 0), 120)])
def test_capability_is_that_of_the_device(monkeypatch, found, expected):
    pytest.importorskip("triton")
    from moe_kit_kernels.lora_experts.launch import capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    assert capability(torch.device("cuda")) == expected
    assert capability(torch.device("cpu")) == 0
