"""Static routers: a budget skips the least important layers where their order is known, and says so where it is not."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_kit import ConfigError, LayerRoutingConfig
from moe_kit.depth import calibrate_budget, layer_applications, set_budget
from moe_kit.depth.measure import layer_importance
from moe_kit.training.depth import open_recipe, skip_least_important
from tests.depth.families import LAYERS, padded_batch, tiny
from tests.depth.test_recipes import shrunk

ORDER = [3, 1, 4, 2]


def static(**values):
    return get_peft_model(tiny(), LayerRoutingConfig.from_preset("static", **values)).eval()


@torch.no_grad()
def skipped(model):
    model(**padded_batch((9, 6)))
    table = layer_applications(model)
    assert (table == table[0]).all()
    return [layer for layer in range(table.shape[1]) if table[0, layer] == 0]


def test_a_budget_takes_the_first_of_the_order(tmp_path):
    model = static(skip_order=ORDER, budget=0.5)
    assert skipped(model) == [1, 3]
    for count in range(LAYERS):
        set_budget(model, count / 4)
        assert skipped(model) == sorted(ORDER[:count])
    assert calibrate_budget(model, [padded_batch((9, 6))], 0.25) == (0.25, 0.25)
    assert skipped(model) == [3]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["skip_order"] == ORDER
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert skipped(again) == [3]
    set_budget(again, 0.75)
    assert skipped(again) == sorted(ORDER[:3])


def test_named_layers_are_a_budget_and_take_no_other():
    model = static(skip_layers=[1, 2])
    assert skipped(model) == [1, 2]
    assert model.peft_config["default"].budget == 0.5
    set_budget(model, 0.5)
    assert skipped(model) == [1, 2]
    for budget in (0.25, 0.75):
        with pytest.raises(ConfigError, match=r"skip_layers names \[1, 2\], in no order"):
            set_budget(model, budget)
    with pytest.raises(ConfigError, match="in no order"):
        calibrate_budget(model, [padded_batch((9, 6))], 0.25)
    assert skipped(model) == [1, 2]
    assert model.peft_config["default"].budget == 0.5


def test_orders_that_do_not_fit_are_refused():
    for wrong in (ORDER[:3], [0, *ORDER], [3, 1, 4, 5]):
        with pytest.raises(ConfigError, match="skip_order"):
            static(skip_order=wrong)
    for wrong in (dict(skip_order=[1, 1]), dict(skip_layers=[2, 2]), dict(skip_order=ORDER, skip_layers=[1])):
        with pytest.raises(ConfigError, match="skip_"):
            LayerRoutingConfig.from_preset("static", **wrong)


def test_importance_leaves_its_order_with_the_router(tmp_path):
    work = open_recipe(shrunk("static", tmp_path), 16)
    batches = [next(work.batches(2)) for _ in range(2)]
    chosen = skip_least_important(work, batches)
    config = work.model.peft_config["depth"]
    influence = layer_importance(work.model, batches)
    assert config.skip_order == sorted(config.skip_order, key=lambda layer: float(influence[layer]))
    count = round(config.budget * len(config.skip_order))
    assert chosen == sorted(config.skip_order[:count])
    work.model.eval()
    assert skipped(work.model) == chosen
    set_budget(work.model, 0.6)
    assert skipped(work.model) == sorted(config.skip_order[: round(0.6 * len(config.skip_order))])
