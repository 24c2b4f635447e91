"""Which routings run on the kernels, what is kept, dropped weights, decode's planted bugs, offsets beyond 2^31.

Run by test_interpreter.py in a process of its own with TRITON_INTERPRET=1.
"""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from moe_kit_kernels import (
    KernelError,
    experts_mlp,
    grouped_mm,
    lora_down,
    lora_experts,
    lora_grouped,
    lora_linear,
    lora_up,
    token_gather,
    token_scatter,
)
from moe_kit_kernels.lora_experts import choice, dispatch, launch, triton_halves
from moe_kit_kernels.route_plan import route_plan

from tests.kernels.interpreter.cases_lora import make, run
from tests.kernels.planted import plant
from tests.tolerances import assert_close

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreter.py"


@pytest.fixture
def launched(monkeypatch):
    """Names of the LoRA kernels that ran."""
    names = []

    class Seen:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in dir(launch):
        if name.startswith("lora_") and name.endswith("_kernel"):
            monkeypatch.setattr(launch, name, Seen(name, getattr(launch, name)))
    return names


def many(slots, E=12):
    ids = torch.stack([torch.randperm(E)[:slots] for _ in range(5)])
    return ids, {
        "x": torch.randn(5, 16),
        "A": torch.randn(E, 4, 16) / 4,
        "B": torch.randn(E, 8, 4),
        "weights": torch.rand(5, slots),
        "base": torch.randn(5, 8),
    }


@pytest.mark.parametrize("slots", [choice.MAX_SLOTS, choice.MAX_SLOTS + 1])
@pytest.mark.parametrize("planned", [False, True])
def test_many_slots_are_not_unrolled(planned, slots, launched, poison_empty):
    ids, t = many(slots)
    kernels = slots <= choice.MAX_SLOTS
    routing = (None, route_plan(ids, 12)) if planned else (ids, None)
    W = torch.randn(8, 16)

    def whole(how, x, A, B, weights, base):
        return lora_experts(x, A, B, routing[0], weights, plan=routing[1], base_TO=base, backend=how)

    def linear(how, x, A, B, weights, base):
        return base + lora_linear(x, W, None, A, B, routing[0], weights, plan=routing[1], backend=how)

    def halves(how, x, A, B, weights, base):
        plan = route_plan(ids, 12)
        return lora_up(lora_down(x, A, plan, backend=how), B, plan, weights, base_TO=base, backend=how)

    for function in (whole, linear, halves):
        expected, actual = (run(partial(function, how), t) for how in ("reference", "auto"))
        for name, value in expected.items():
            assert_close(name, actual[name], value)
        with torch.no_grad():
            assert_close("y", function("auto", **t), expected["y"])
        if not kernels:
            with pytest.raises(KernelError, match=r"'triton' with 9 experts a token, expected at most 8"):
                function("triton", **t)
        elif function is not linear:
            assert launched
    assert bool(launched) is kernels
    torch._dynamo.reset()
    launched.clear()
    compiled = run(torch.compile(lambda **t: whole("auto", **t), fullgraph=True, backend="aot_eager"), t)
    for name, value in run(lambda **t: whole("reference", **t), t).items():
        assert_close(name, compiled[name], value)
    assert bool(launched) is kernels


@pytest.mark.parametrize("E", [3, 12])
def test_every_expert_is_plain_gemms(E, launched, poison_empty):
    _, t = many(E, E)
    W = torch.randn(8, 16)

    def whole(how, x, A, B, weights, base):
        return lora_experts(x, A, B, None, weights, base_TO=base, backend=how)

    def linear(how, x, A, B, weights, base):
        return base + lora_linear(x, W, None, A, B, None, weights, backend=how)

    for function in (whole, linear):
        expected = run(partial(function, "reference"), t)
        for how in ("auto", "dense", "sorted"):
            for name, value in run(partial(function, how), t).items():
                assert_close(name, value, expected[name])
            with torch.no_grad():
                assert_close("y", function(how, **t), expected["y"])
        assert not launched
        # asked for by name they run where they can
        if E > choice.MAX_SLOTS:
            with pytest.raises(KernelError, match="'triton' with 12 experts a token"):
                function("triton", **t)
            continue
        for name, value in run(partial(function, "triton"), t).items():
            assert_close(name, value, expected[name])
        assert launched
        launched.clear()


@pytest.mark.parametrize("how", ["dense", "mixed", "sorted"])
def test_saved_tensors_are_the_promised_ones(how, monkeypatch):
    ids, t = make("taller than a tile")
    leaves = {name: t[name].requires_grad_() for name in ("x", "A", "B", "weights", "base")}
    plan = route_plan(ids, 3)
    monkeypatch.setattr(dispatch, "choose", lambda *_: how)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        lora_experts(leaves["x"], leaves["A"], leaves["B"], None, leaves["weights"], plan=plan, base_TO=leaves["base"])
    own = {name: leaves[name].data_ptr() for name in ("x", "A", "B", "weights")}
    assert sorted(s.data_ptr() for s in saved if s.data_ptr() in own.values()) == sorted(own.values())
    assert [tuple(s.shape) for s in saved if s.data_ptr() not in own.values()] == [(ids.numel(), 4)]


@pytest.mark.parametrize("how", ["dense", "mixed", "sorted", "decode"])
def test_weights_of_dropped_slots_may_be_nan(how, monkeypatch, poison_empty):
    ids, t = make("empty slots")
    del t["W"], t["bias"]
    dropped = (ids < 0) | (ids >= 2)
    monkeypatch.setattr(dispatch, "choose", lambda *_: how)
    monkeypatch.setattr(triton_halves, "choose", lambda *_: how)

    def call(x, A, B, weights, base):
        return lora_experts(x, A, B, ids, weights, base_TO=base)

    results = []
    for value in (0.0, float("nan")):
        held = t | {"weights": t["weights"].masked_fill(dropped, value)}
        if how == "decode":
            with torch.no_grad():
                results.append({"y": call(**held)})
        else:
            results.append(run(call, held))
    for name, clean in results[0].items():
        assert_close(name, results[1][name], clean)


DECODE_BUGS = {
    "wrong expert's A": (
        "lora_decode_down_kernel",
        "                + expert.to(tl.int64) * stride_ae",
        "                + 0",
    ),
    "wrong token": ("lora_decode_down_kernel", "(pair // K) * stride_xt", "(pair % K) * stride_xt"),
    "inner mask one short": ("lora_decode_down_kernel", "+ d, mask=d < D,", "+ d, mask=d < D - 1,"),
    "rank one short": ("lora_decode_down_kernel", "mask=(l < L)[:, None]", "mask=(l < L - 1)[:, None]"),
    "empty slot not written": (
        "lora_decode_down_kernel",
        "    sums = tl.zeros((LP,), dtype=tl.float32)\n    if (expert >= 0) & (expert < E):",
        "    sums = tl.zeros((LP,), dtype=tl.float32) + 1\n    if (expert >= 0) & (expert < E):",
    ),
    "wrong expert's B": (
        "lora_decode_up_kernel",
        "                + expert.to(tl.int64) * stride_be",
        "                + 0",
    ),
    "column mask one short": ("lora_decode_up_kernel", "mask_n = cols < O", "mask_n = cols < O - 1"),
    "no gate": ("lora_decode_up_kernel", "weight = scale * tl.load(weights_ptr + pair)", "weight = scale"),
    "last slot left out": (
        "lora_decode_up_kernel",
        "    for k in tl.static_range(K):",
        "    for k in tl.static_range(K - 1):",
    ),
    "no base": ("lora_decode_up_kernel", "    if BASE:", "    if BASE and BN > 9999:"),
}


def compare_decode():
    with torch.no_grad():
        for edge in ("odd widths", "empty slots"):
            ids, t = make(edge)
            args = (t["x"], t["A"], t["B"], ids, t["weights"])
            y = lora_experts(*args, base_TO=t["base"], scale=0.7, backend="decode")
            assert_close("y", y, lora_experts(*args, base_TO=t["base"], scale=0.7, backend="reference"))


def test_sound_decode_passes(poison_empty):
    compare_decode()


@pytest.mark.parametrize("bug", DECODE_BUGS)
def test_bug_of_decode_is_caught(bug, tmp_path, monkeypatch, poison_empty):
    plant(DECODE_BUGS[bug], launch, Path(launch.__file__).with_name("triton.py"), tmp_path, monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        compare_decode()


# three rows or experts this far apart reach past 2^31 elements, while the stride itself is a 32-bit number
FAR = 2**30 + 8


def far(values):
    """Lay the first dimension of a tensor out over 4 GiB of address space, of which only a few pages are ever touched."""
    store = torch.empty(2 * FAR + values[0].numel(), dtype=torch.float16)
    view = store.as_strided(values.shape, (FAR, *values.stride()[1:]))
    return view.copy_(values)


ROWS = torch.tensor([[0, 2], [2, 1], [1, 0]])


@pytest.mark.parametrize("which", ["x", "A", "B", "base"])
@pytest.mark.parametrize("how", ["dense", "sorted", "decode"])
def test_lora_offsets_beyond_32_bits(how, which):
    t = {
        "x": torch.randn(3, 16).half(),
        "A": (torch.randn(3, 4, 16) / 4).half(),
        "B": torch.randn(3, 16, 4).half(),
        "base": torch.randn(3, 16).half(),
    }
    weights = torch.rand(3, 2)

    def call(x, A, B, base, backend=how):
        return lora_experts(x, A, B, ROWS, weights, base_TO=base, backend=backend)

    with torch.no_grad():
        y = call(**t | {which: far(t[which])})
        assert_close("y", y, call(**t, backend="reference"), torch.float16)
    if how == "decode":
        return
    leaves = {name: value.requires_grad_() for name, value in (t | {which: far(t[which])}).items() if name != "base"}
    y = call(**leaves, base=None)
    near = {name: t[name].detach().clone().requires_grad_() for name in leaves}
    expected = call(**near, base=None, backend="reference")
    # dA and dB of a far stack would be laid out as far: only dx
    (dx,) = torch.autograd.grad(y, leaves["x"], torch.ones_like(y))
    (wanted,) = torch.autograd.grad(expected, near["x"], torch.ones_like(y))
    assert_close("dx", dx, wanted, torch.float16)


@pytest.mark.parametrize("which", ["x", "weight", "A", "B", "down"])
def test_grouped_offsets_beyond_32_bits(which):
    t = {
        "x": torch.randn(3, 16),
        "weight": torch.randn(3, 16, 16) / 4,
        "A": torch.randn(3, 4, 16) / 4,
        "B": torch.randn(3, 16, 4),
        "down": torch.randn(3, 16, 8) / 3,
    }
    t = {name: value.half() for name, value in t.items()}
    moved, plan, weights = t | {which: far(t[which])}, route_plan(ROWS, 3), torch.rand(3, 2)
    calls = [
        lambda t, how: grouped_mm(t["x"], t["weight"], plan, gather=True, backend=how),
        lambda t, how: experts_mlp(t["x"], t["weight"], t["down"], ROWS, weights, backend=how),
        lambda t, how: lora_grouped(t["x"], t["weight"], t["A"], t["B"], plan, gather=True, backend=how),
    ]
    for call in calls:
        assert_close(which, call(moved, "triton"), call(t, "reference"), torch.float16)


def test_token_rows_beyond_32_bits():
    x, keep_T = torch.randn(3, 16).half(), torch.tensor([False, True, True])
    x_ND, index_N = token_gather(far(x), keep_T, backend="triton")
    assert torch.equal(x_ND, x[1:])
    y = token_scatter(x_ND, index_N, far(x), backend="triton")
    assert torch.equal(y, x * (1 + keep_T[:, None]))
