"""`torch.export` with any number of tokens: the exported program equals the eager call at sizes it has not seen."""

import pytest
import torch
from moe_kit_kernels import experts_mlp, lora_experts, lora_linear, route_plan, topk_gate

from tests.tolerances import assert_close

E, K, D, O, L = 4, 2, 16, 24, 4


class Gate(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x_TD):
        out = topk_gate(x_TD[:, :E], K, score=self.kind)
        return out.weights_TK, out.ids_TK


class Lora(torch.nn.Module):
    def __init__(self, planned):
        super().__init__()
        self.planned = planned
        self.A, self.B = torch.nn.Parameter(torch.randn(E, L, D) / 4), torch.nn.Parameter(torch.randn(E, O, L))
        self.W = torch.nn.Parameter(torch.randn(O, D) / 4)

    def forward(self, x_TD):
        gate = topk_gate(x_TD[:, :E], K)
        ids, plan = (None, route_plan(gate.ids_TK, E)) if self.planned else (gate.ids_TK, None)
        base_TO = x_TD @ self.W.t()
        y = lora_experts(x_TD, self.A, self.B, ids, gate.weights_TK, plan=plan, base_TO=base_TO, scale=0.5)
        return y, lora_linear(x_TD, self.W, None, self.A, self.B, ids, gate.weights_TK, plan=plan)


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (
            torch.nn.Parameter(torch.randn(E, O, D) / 4),
            torch.nn.Parameter(torch.randn(E, D, O // 2) / 3),
        )

    def forward(self, x_TD):
        gate = topk_gate(x_TD[:, :E], K)
        return (experts_mlp(x_TD, self.up, self.down, gate.ids_TK, gate.weights_TK),)


MODULES = {
    "topk_gate": lambda: Gate("softmax"),
    "topk_gate of sigmoids": lambda: Gate("sigmoid"),
    "lora_experts": lambda: Lora(False),
    "lora_experts with a plan": lambda: Lora(True),
    "experts_mlp": Mlp,
}


@pytest.mark.parametrize("name", MODULES)
def test_any_number_of_tokens(name):
    module = MODULES[name]()
    tokens = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(7, D),), dynamic_shapes=({0: tokens},))
    assert any(dim is not None and not isinstance(dim, int) for dim in _sizes(program)), "T is a symbol"
    exported = program.module()
    for T in (2, 7, 300):
        x_TD = torch.randn(T, D)
        for actual, expected in zip(exported(x_TD), module(x_TD), strict=True):
            if expected.is_floating_point():
                assert_close(f"at {T} tokens", actual, expected)
            else:
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["lora_experts", "experts_mlp"])
def test_the_operators_are_in_the_graph(name):
    program = torch.export.export(MODULES[name](), (torch.randn(7, D),))
    assert f"torch.ops.moe_kit.{name}" in program.graph_module.code


def _sizes(program):
    return [
        size for node in program.graph.nodes if "val" in node.meta for size in getattr(node.meta["val"], "shape", ())
    ]
