"""`add_weighted_adapter`: the sum of trained adapters as one, where it is one, beside PEFT's LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from moe_kit import RoutedAdapterConfig, RoutingContext, RoutingError
from moe_kit.adapters.base_experts import AdaptedExperts
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.routing.state import find_routing_state
from tests.adapters.rule_cases import wake_routers
from tests.conformance.common import config, take_loras
from tests.tiny import batch_of, tiny_llama, tiny_moe, wake_banks

WEIGHTS = [0.75, -1.5]


def pair(first, second, base=None):
    """Two adapters whose experts differ and whose routers are equal."""
    model = get_peft_model(base or tiny_llama().eval(), first, adapter_name="a")
    model.add_adapter("b", second)
    wake_banks(model)
    wake_routers(model)
    for layer in model.modules():
        if isinstance(layer, RoutedLayer) and "a" in layer.moe_adapter_router:
            layer.moe_adapter_router["b"].load_state_dict(layer.moe_adapter_router["a"].state_dict())
    return model.eval()


@torch.no_grad()
def added(model, layer, name, *inputs):
    """What an adapter adds to the output of a layer."""
    with model.disable_adapter():
        base = layer(*inputs)
    model.set_adapter(name)
    return layer(*inputs) - base


def check_sum(model, weights=WEIGHTS, name="sum"):
    layers = [layer for layer in model.modules() if isinstance(layer, (RoutedLayer, LoraLayer))]
    assert layers
    for layer in layers:
        x = torch.randn(2, 5, layer.in_features)
        expected = sum(
            weight * added(model, layer, other, x) for weight, other in zip(weights, ("a", "b"), strict=True)
        )
        found = added(model, layer, name, x)
        assert found.abs().max() > 1e-2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def fly(**options):
    return RoutedAdapterConfig.from_preset(
        "flylora", num_experts=6, top_k=2, target_modules=["q_proj", "up_proj"], **options
    )


class TestSums:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            dict(preset="dense_lora_moe"),
            dict(preset="hydralora"),
            dict(preset="loss_free"),
            dict(preset="remix"),
            dict(preset="remix", use_rslora=False),
            dict(scope="sequence"),
            dict(router_sharing="none", rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 3}),
        ],
        ids=str,
    )
    def test_ranks_side_by_side(self, options, tmp_path):
        model = pair(config(**options), config(**{**options, "r": 2, "lora_alpha": 5}))
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", combination_type="cat")
        check_sum(model)
        # the trained state of routers and experts is the new adapter's own
        model.set_adapter("sum")
        with torch.no_grad():
            expected = model(**batch_of()).logits
        model.delete_adapter("a")
        model.delete_adapter("b")
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(model(**batch_of()).logits, expected)
            again = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / "sum", adapter_name="x").eval()
            assert torch.equal(again(**batch_of()).logits, expected)

    def test_plain_lora_means_the_same(self):
        settings = dict(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(tiny_llama().eval(), LoraConfig(r=2, **settings), adapter_name="a")
        model.add_adapter("b", LoraConfig(r=3, lora_alpha=5, **settings))
        model.eval().add_weighted_adapter(["a", "b"], WEIGHTS, "sum", combination_type="cat")
        check_sum(model)

    def test_rank_one_experts_under_one_projection(self):
        model = pair(fly(), fly(lora_alpha=3.0))
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", combination_type="linear")
        check_sum(model)

    def test_one_table_of_tasks(self):
        poly = dict(num_experts=3, num_tasks=2, target_modules=["q_proj", "up_proj"])
        model = pair(
            RoutedAdapterConfig.from_preset("poly", r=2, **poly), RoutedAdapterConfig.from_preset("poly", r=4, **poly)
        )
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")
        # layers are called by hand, so that no pass of the model opens a context
        find_routing_state(model).context = RoutingContext(task_ids_B=torch.tensor([1, 0]), is_open=False)
        check_sum(model)

    def test_experts_of_the_base(self):
        options = dict(target_modules=None, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        first = config(**options, r=2, use_rslora=True)
        model = get_peft_model(tiny_moe("Mixtral").eval(), first, adapter_name="a")
        model.add_adapter("b", config(**options, rank_pattern={"layers.1.*down_proj": 4}, lora_alpha=5))
        wake_banks(model)
        model.eval().add_weighted_adapter(["a", "b"], WEIGHTS, "sum")
        for layer in model.modules():
            if isinstance(layer, AdaptedExperts):
                banks = [layer.moe_adapter_bank[name] for name in ("a", "b", "sum")]
                for stack in banks[0]:
                    one, two, both = (bank[stack] for bank in banks)
                    for expert in range(4):
                        expected = WEIGHTS[0] * one.delta(expert) + WEIGHTS[1] * two.delta(expert)
                        torch.testing.assert_close(both.delta(expert), expected, rtol=1e-4, atol=1e-5)

    def test_linear_is_peft_s(self):
        """One expert at weight 1 is a LoRA, and factors are added as PEFT adds them."""
        one = dict(num_experts=1, top_k=1, losses={}, target_modules=["q_proj"])
        model = pair(config(**one), config(**one, lora_alpha=5))
        settings = dict(r=3, target_modules=["q_proj"], init_lora_weights=False)
        lora = get_peft_model(tiny_llama().eval(), LoraConfig(lora_alpha=16, **settings), adapter_name="a")
        lora.add_adapter("b", LoraConfig(lora_alpha=5, **settings))
        take_loras(model, lora)
        for each in (model, lora):
            each.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", combination_type="linear")
            each.set_adapter("sum")
        with torch.no_grad():
            torch.testing.assert_close(
                model(**batch_of()).logits, lora.eval()(**batch_of()).logits, rtol=1e-4, atol=1e-4
            )

    def test_of_a_single_adapter(self):
        model = pair(config(), config())
        model.add_weighted_adapter(["a"], [0.5], "smaller")
        check_sum(model, [0.5, 0.0], "smaller")
        assert model.active_adapter == "smaller"


class TestRefusals:
    @pytest.mark.parametrize(
        ("second", "message"),
        [
            (dict(num_experts=3), "differ in num_experts"),
            (dict(preset="loss_free"), "differ in .*stepper"),
            (dict(target_modules=["q_proj"]), "has no adapter 'b'"),
        ],
    )
    def test_other_adapters(self, second, message):
        model = get_peft_model(tiny_llama(), config(), adapter_name="a")
        model.add_adapter("b", config(**second))
        for layer in model.modules():
            routers = layer.moe_adapter_router if isinstance(layer, RoutedLayer) else {}
            if len(routers) == 2 and "num_experts" not in second:
                routers["b"].load_state_dict(routers["a"].state_dict(), strict=False)
        before = set(model.peft_config)
        with pytest.raises(RoutingError, match=message):
            model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")
        assert set(model.peft_config) == before

    def test_routers_that_differ(self):
        model = get_peft_model(tiny_llama(), config(), adapter_name="a")
        model.add_adapter("b", config())
        with pytest.raises(RoutingError, match=r"routers at .*q_proj have different weights.*freeze_router=True"):
            model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")

    @pytest.mark.parametrize("kind", ["svd", "ties", "dare_linear", "magnitude_prune"])
    def test_kinds_for_one_matrix(self, kind):
        with pytest.raises(RoutingError, match=rf"'{kind}', expected one of cat, linear.*collapse_to_lora"):
            pair(config(), config()).add_weighted_adapter(["a", "b"], WEIGHTS, "sum", kind)

    def test_ranks_for_linear(self):
        with pytest.raises(RoutingError, match="'linear' needs one rank"):
            pair(config(), config(r=2)).add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "linear")

    def test_banks_without_a_rank(self):
        with pytest.raises(RoutingError, match="bank 'rank_one' cannot be combined by 'cat'"):
            pair(fly(), fly()).add_weighted_adapter(["a", "b"], WEIGHTS, "sum")

    def test_copies_of_modules(self):
        model = pair(config(modules_to_save=["lm_head"]), config())
        with pytest.raises(RoutingError, match="modules_to_save"):
            model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")

    @pytest.mark.parametrize(
        ("adapters", "weights", "name", "message"),
        [
            (["a", "c"], WEIGHTS, "sum", "expected names among"),
            ([], [], "sum", "expected names among"),
            (["a", "b"], WEIGHTS, "b", "'b' exists already"),
            (["a", "b"], [1.0], "sum", "1 weights for 2 adapters"),
            (["a", "a"], WEIGHTS, "sum", "name one twice"),
        ],
    )
    def test_names_and_weights(self, adapters, weights, name, message):
        with pytest.raises(RoutingError, match=message):
            pair(config(), config()).add_weighted_adapter(adapters, weights, name)
