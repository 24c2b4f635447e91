"""Packed rows with padding behind the documents (`padding_free` with `pad_to_multiple_of`): gaps are no documents."""

import pytest
import torch

from moe_kit import routing_losses
from moe_kit.routing.state import require_routing_state
from tests.conformance.common import routed
from tests.tiny import batch_of


def packed(multiple, pad=0):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"input_ids": row.tolist()} for row in batch_of(3, 7)["input_ids"]]
    collate = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=True, pad_to_multiple_of=multiple)
    return {name: value for name, value in collate(rows).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("multiple", [8, 32])
def test_gaps_change_nothing(multiple, scope):
    model = routed(losses={"switch": 1.0}, scope=scope).train()
    losses = []
    for size in (None, multiple):
        batch = packed(size)
        losses.append((model(**batch).loss.detach(), routing_losses(model)["switch"].detach()))
        context = require_routing_state(model).context
        assert context.num_sequences == 3
    torch.testing.assert_close(losses[1], losses[0])


def test_a_document_of_one_token_counts():
    model = routed(losses={"switch": 1.0}).train()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0]]))
    context = require_routing_state(model).context
    assert context.num_sequences == 2
    assert context.mask_BS is None
