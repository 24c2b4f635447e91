"""Kernels are launched on the device of their tensors: what can be said about it without a GPU."""

import ast
from pathlib import Path

import moe_kit_kernels
import pytest
import torch
from moe_kit_kernels.common.device import on_its_device

FOLDER = Path(moe_kit_kernels.__file__).parent


@pytest.mark.parametrize(("index", "current", "switched"), [(1, 0, [1]), (0, 0, []), (3, 1, [3])])
def test_the_device_is_switched_where_it_differs(index, current, switched, monkeypatch):
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.index)

        def __exit__(self, *_):
            entered.append("left")

    class OnGPU(torch.Tensor):
        device = torch.device("cuda", index)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    seen = []

    @on_its_device
    def launch(ctx, x, scale=1.0):
        seen.append((scale, list(entered)))
        return x

    x = torch.zeros(2).as_subclass(OnGPU)
    assert launch("context", x, scale=2.0) is x
    assert seen == [(2.0, switched)]
    assert entered == [*switched, *["left"] * len(switched)]
    # the CPU asks nothing of a GPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked"))
    launch("context", torch.zeros(2))


def test_every_launch_is_guarded():
    """A function that launches is decorated, or is called by decorated ones of its file only."""
    found = 0
    for path in FOLDER.rglob("*.py"):
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        guarded = {f.name for f in functions if "on_its_device" in {ast.unparse(d) for d in f.decorator_list}}
        for function in functions:
            launches = [
                node
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Subscript)
                and ast.unparse(node.func.value).endswith("_kernel")
            ]
            found += len(launches)
            if not launches or function.name in guarded:
                continue
            callers = {
                other.name
                for other in functions
                for node in ast.walk(other)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == function.name
            }
            assert callers, (path.name, function.name)
            assert callers <= guarded, (path.name, function.name)
    assert found >= 20
