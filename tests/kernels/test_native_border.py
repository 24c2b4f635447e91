"""No array reaches a library that is not what the library will read: each mismatch is planted at each array of each function."""

import pytest
import torch
from moe_kit_kernels import KernelError, experts_mlp, lora_experts, lora_grouped, route_plan, route_plan_pairs
from moe_kit_kernels.common.native import Function
from moe_kit_kernels.grouped_mm import native as grouped
from moe_kit_kernels.lora_experts import native as lora
from moe_kit_kernels.route_plan import native as plans

from tests.kernels.compiled import only_where_it_runs
from tests.kernels.lora_cases import make

NATIVES = (plans.NATIVE, grouped.NATIVE, lora.NATIVE)
pytestmark = [only_where_it_runs(native) for native in NATIVES]
FUNCTIONS = sorted(name for native in NATIVES for name in native.takes)


class Plain(torch.Tensor):
    """A subclass, whose numbers may lie elsewhere."""


WRONG = {
    "a narrower dtype": lambda t: t.to(torch.bfloat16 if t.is_floating_point() else torch.int16),
    "a wider dtype": lambda t: t.double() if t.is_floating_point() else t.to(torch.float64),
    "one number too few": lambda t: t.reshape(-1)[:-1],
    "one number too many": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]),
    "strides": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "no memory": lambda t: t.to("meta"),
    "a subclass": lambda t: t.as_subclass(Plain),
}


def calls():
    """One call of every function, as the operators make it: {name: (function, arguments)}."""
    found = {}
    record = lambda self, *arguments: found.setdefault(self.name, (self, arguments)) and run(self, *arguments)  # noqa: E731
    run, Function.__call__ = Function.__call__, record
    try:
        x, A, B, base, ids, weights = make(9, 4, 2, 20, 33, 5, dtype=torch.float32)
        lora_experts(x, A, B, ids, weights, base_TO=base, backend="native").sum().backward()
        with torch.no_grad():
            lora_experts(x, A, B, ids, weights, base_TO=base, backend="native")
        pairs = route_plan_pairs(torch.tensor([3, 0, 3, 6]), torch.tensor([1, 0, 1, 2]), 9, 4)
        lora_experts(x, A, B, None, torch.rand(4), plan=pairs, backend="native").sum().backward()
        tensors = [torch.randn(size, requires_grad=True) for size in ((9, 20), (4, 24, 20), (4, 20, 12))]
        experts_mlp(*tensors, ids, weights.detach().requires_grad_(), backend="native").sum().backward()
        stack = torch.randn(4, 33, 20, requires_grad=True)
        lora_grouped(x, stack, A, B, route_plan(ids, 4), gather=True, backend="native").sum().backward()
    finally:
        Function.__call__ = run
    assert sorted(found) == FUNCTIONS
    return found


@pytest.fixture(scope="module")
def made():
    return calls()


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_array_of_every_function(name, wrong, made, monkeypatch):
    function, arguments = made[name]
    monkeypatch.setattr(function, "entry", lambda *_: pytest.fail("the library was called"))
    planted = 0
    for place, (array, *_) in enumerate(function.arrays):
        given = arguments[place]
        if given is None:
            continue
        bad = WRONG[wrong](given.detach())
        with pytest.raises(KernelError, match=rf"{name}: .*\b{array}\b"):
            function(*arguments[:place], bad, *arguments[place + 1 :])
        planted += 1
    assert planted >= 4


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_must_be_there(name, made, monkeypatch):
    function, arguments = made[name]
    monkeypatch.setattr(function, "entry", lambda *_: 0)
    for place, (array, _, _, optional) in enumerate(function.arrays):
        missing = (*arguments[:place], None, *arguments[place + 1 :])
        if optional:
            function(*missing)
            continue
        with pytest.raises(KernelError, match=f"{name}: {array} is None"):
            function(*missing)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sizes(name, made, monkeypatch):
    """A negative size, and one past what the library's own buffers hold."""
    function, arguments = made[name]
    monkeypatch.setattr(function, "entry", lambda *_: pytest.fail("the library was called"))
    count = len(function.arrays)
    for place, number in enumerate(function.numbers):
        if isinstance(arguments[count + place], float):
            continue
        for value in [-1, *(most + 1 for of, most in function.limits.items() if of == number)]:
            with pytest.raises(KernelError, match=name):
                function(*arguments[: count + place], value, *arguments[count + place + 1 :])


def test_all_functions_of_a_source_are_declared():
    for native in NATIVES:
        text = native.source.read_text()
        functions = {
            line.split("(")[0].split()[-1] for line in text.splitlines() if " moe_kit_" in line and "(" in line[:60]
        }
        assert functions == set(native.takes)


# ids and weights are made contiguous first, and the ids say how many weights there are
STEPS = [(array, wrong) for array in ("x", "y") for wrong in WRONG]
STEPS += [(array, wrong) for array in ("ids", "weights") for wrong in WRONG if wrong != "strides"]


@pytest.mark.parametrize(("array", "wrong"), STEPS)
def test_arrays_of_a_step(array, wrong, monkeypatch):
    """Banks are checked once, the other arrays at each step."""
    x, A, B, base, ids, weights = (t.detach() for t in make(1, 4, 2, 20, 33, 5, dtype=torch.float32))
    banks = lora.DecodeBanks([A, A], [B, B])
    given = {"ids": ids, "x": x, "weights": weights, "y": base}

    def step(ids, x, weights, y):
        banks.add([y, y], x, ids.view(1, -1), weights, 1.0)

    step(**given)
    monkeypatch.setattr(banks.function, "entry", lambda *_: pytest.fail("the library was called"))
    refused = "weights" if array == "ids" and wrong.startswith("one number") else array
    with pytest.raises(KernelError, match=rf"moe_kit_lora_table: .*\b{refused}\b"):
        step(**given | {array: WRONG[wrong](given[array])})


@pytest.mark.parametrize("place", range(2))
@pytest.mark.parametrize("wrong", ["a wider dtype", "no memory", "a subclass"])
def test_banks_of_a_step(place, wrong, monkeypatch):
    x, A, B, base, ids, weights = (t.detach() for t in make(1, 4, 2, 20, 33, 5, dtype=torch.float32))
    given = [A, B]
    given[place] = WRONG[wrong](given[place])
    banks = lora.DecodeBanks(given[:1], given[1:])
    monkeypatch.setattr(banks.function, "entry", lambda *_: pytest.fail("the library was called"))
    with pytest.raises(KernelError, match=rf"moe_kit_lora_table: .*\b{'AB'[place]}\b"):
        banks.add([base], x, ids, weights, 1.0)
