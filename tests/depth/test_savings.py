"""Skipped work is really not done, counted in floating-point operations."""

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from moe_kit.depth import LayerRoutingConfig, force_layers
from tests.depth.families import LAYERS, padded_batch, tiny
from tests.depth.test_routers import routed


def flops(function):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("batch", [1, 4])
def test_agreeing_rows_save_in_proportion(phase, batch):
    plain, model = tiny(), get_peft_model(tiny(), LayerRoutingConfig()).eval()
    ids = padded_batch((12,) * batch)["input_ids"]

    def cost(which, row):
        def call(options):
            if row is None:
                return which(ids, **options)
            with force_layers(which, [row]):
                return which(ids, **options)

        if phase == "prefill":
            return flops(lambda: call({}))
        with torch.no_grad():
            cache = call(dict(use_cache=True)).past_key_values
        return flops(lambda: which(ids[:, :1], past_key_values=cache))

    dense, none = cost(plain, None), cost(model, [1, 0, 0, 0, 0])
    for row in ([1, 0, 1, 1, 1], [1, 0, 1, 0, 1]):
        share = row.count(0) / (LAYERS - 1)
        assert (dense - cost(model, row)) / (share * (dense - none)) >= 0.98


def test_mixed_rows_cost_what_their_rows_cost():
    model = get_peft_model(tiny(), LayerRoutingConfig()).eval()
    ids = padded_batch((12, 12))["input_ids"]

    def cost(rows):
        with force_layers(model, rows):
            return flops(lambda: model(ids, use_cache=True))

    full, half, none = (cost(rows) for rows in ([[1] * 5], [[1] * 5, [1, 0, 0, 0, 0]], [[1, 0, 0, 0, 0]]))
    assert half == pytest.approx((full + none) / 2, rel=1e-6)


def test_half_the_tokens_cost_half_the_mlp():
    model = routed("flexi", start=0.0, layers=[1])
    mlp = model.get_base_model().model.layers[1].mlp
    x = torch.randn(1, 64, 32)
    with torch.no_grad():
        run = model.base_model.model.model.layers[1].mlp.depth_unit
        replay = {run.site("default"): (torch.arange(64) % 2)[:, None]}
        run.state.routing.context.mask_BS = None
        dense = flops(lambda: type(mlp).__mro__[1].forward(mlp, x))
        run.state.routing.context.replay = replay
        assert flops(lambda: mlp(x)) == dense / 2


def test_tokens_that_skip_an_attention_cost_keys_and_values_only():
    model = routed("informed")
    ids = padded_batch((12,))["input_ids"]
    table = torch.ones(1, 2 * LAYERS, dtype=torch.long)
    costs = []
    for action in (1, 0):
        table[0, 4] = action
        with force_layers(model, table):
            with torch.no_grad():
                cache = model(ids, use_cache=True).past_key_values
            costs.append(flops(lambda cache=cache: model(ids[:, :1], past_key_values=cache)))
    attention = model.get_base_model().model.layers[2].self_attn
    width = attention.q_proj.in_features
    saved = 2 * width * (attention.q_proj.out_features + attention.o_proj.in_features)
    # queries and output projection at least; not every attention kernel is counted
    assert costs[0] - costs[1] >= saved
