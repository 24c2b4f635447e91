"""`torch.compile` over batches of many lengths makes two graphs, as for LoRA, and export takes dynamic shapes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.conformance.common import routed
from tests.tiny import tiny_llama

PRESETS = {
    "mixture_of_lora": {},
    "sequence": dict(scope="sequence"),
    "model": dict(router_sharing="model"),
    "flylora": dict(preset="flylora", num_experts=8, top_k=4, r=None),
    "loss_free": dict(preset="loss_free"),
}


def batch(length):
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


@pytest.mark.parametrize("options", PRESETS.values(), ids=PRESETS.keys())
@torch.no_grad()
def test_two_graphs(options):
    torch._dynamo.reset()
    options = {name: value for name, value in options.items() if value is not None}
    counter = CompileCounter()
    model = routed(tiny_llama(layers=1).eval(), **options)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (5, 6, 7, 9, 20):
        torch.testing.assert_close(
            compiled(**batch(length)).logits, model(**batch(length)).logits, rtol=1e-4, atol=1e-4
        )
    assert counter.frame_count == 2


@torch.no_grad()
def test_export_with_dynamic_shapes():
    model = routed(tiny_llama(layers=1).eval()).get_base_model()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(Logits(), (batch(6)["input_ids"],), dynamic_shapes=shapes).module()
    for length in (6, 9):
        ids = batch(length)["input_ids"]
        torch.testing.assert_close(program(ids), Logits()(ids), rtol=1e-4, atol=1e-4)
