"""The cost model picks what the accounting of routed LoRA says: crossovers from first principles, not from the code."""

import pytest
from moe_kit_kernels.cost_model import (
    A100,
    CPU,
    H100,
    LoraShape,
    choose_lora,
    decode_seconds,
    dense_seconds,
    sorted_seconds,
)


def shape(T=16384, E=8, L=8, D=4096, O=4096, K=2, itemsize=2):
    return LoraShape(tokens=T, pairs=T * K, experts=E, rank=L, d_in=D, d_out=O, itemsize=itemsize)


def test_ridges():
    assert H100.ridge == pytest.approx(232, abs=1)
    assert A100.ridge == pytest.approx(147, abs=1)


@pytest.mark.parametrize(
    ("device", "E", "L", "dense_us", "sorted_us"),
    [
        # forward of T = 16384, 4096 -> 4096, top-2, bf16: dense-masked against sorted down + read-modify-write up
        (H100, 8, 8, 146, 288),
        (H100, 8, 16, 148, 289),
        (H100, 8, 64, 211, 294),
        (H100, 64, 16, 423, 294),
        (H100, 64, 64, 1692, 315),
        (A100, 8, 16, 243, 476),
        (A100, 64, 16, 1100, 485),
    ],
)
def test_modelled_times(device, E, L, dense_us, sorted_us):
    assert dense_seconds(shape(E=E, L=L), device) * 1e6 == pytest.approx(dense_us, rel=0.35)
    assert sorted_seconds(shape(E=E, L=L), device) * 1e6 == pytest.approx(sorted_us, rel=0.15)


@pytest.mark.parametrize(("device", "low", "high"), [(H100, 464, 928), (A100, 294, 588)])
def test_dense_wins_below_the_crossover(device, low, high):
    # K * ridge for the down stage, 2K * ridge for the up stage: below both dense, above both sorted
    assert choose_lora(shape(E=1, L=low - 64), device, training=True) == "dense"
    assert choose_lora(shape(E=8, L=high // 8 + 16), device, training=True) == "sorted"


@pytest.mark.parametrize("device", [H100, A100])
def test_a_few_tokens_decode(device):
    few = shape(T=8, E=64, L=16)
    assert choose_lora(few, device, training=False) == "decode"
    assert choose_lora(few, device, training=True) != "decode"
    assert choose_lora(shape(E=64, L=16), device, training=False) != "decode"


@pytest.mark.parametrize("width", [576, 2048])
def test_cpu_choices(width):
    sizes = {"D": width, "O": width, "itemsize": 4}
    for L in (8, 16):
        for T in (128, 512, 1024):
            assert choose_lora(shape(T=T, E=8, L=L, **sizes), CPU, training=True) == "dense"
    assert choose_lora(shape(T=1024, E=64, L=8, **sizes), CPU, training=True) == "sorted"
    assert choose_lora(shape(T=1024, E=64, L=64, **sizes), CPU, training=True) == "sorted"
    assert choose_lora(shape(T=1, E=64, L=8, **sizes), CPU, training=False) == "decode"
    assert choose_lora(shape(T=1, E=8, L=8, **sizes), CPU, training=False) == "decode"


def test_more_work_costs_more():
    for seconds in (dense_seconds, sorted_seconds, decode_seconds):
        for device in (H100, CPU):
            assert seconds(shape(T=2048), device) > seconds(shape(T=1024), device)
            assert seconds(shape(L=256), device) > seconds(shape(L=8), device)
