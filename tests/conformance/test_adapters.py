"""Several adapters on one model: add, switch, disable, delete, unload, merge; with LoRA; through transformers alone."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model

from moe_kit import ConfigError, RoutedAdapterConfig, RoutingError, routing_inputs, routing_losses
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.hf.hooks import _HOOKS
from moe_kit.routing import weighted_routing_loss
from moe_kit.routing.state import ATTRIBUTE, find_routing_state
from tests.conformance.common import NAME, config, routed, wake
from tests.tiny import batch_of, tiny_llama, wake_banks
from tests.tolerances import assert_close

LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def logits(model, **overrides):
    return model(**{**batch_of(), **overrides}).logits


def base_logits():
    return logits(tiny_llama().eval())


class TestAttributes:
    def test_a_wrapped_model_has_what_peft_promises(self):
        model = routed()
        for name in ("save_pretrained", "from_pretrained", "push_to_hub", "generate", "disable_adapter"):
            assert hasattr(model, name), name
        assert model.active_adapter == NAME
        assert model.active_adapters == [NAME]
        assert set(model.peft_config) == {NAME}
        assert isinstance(model.peft_config[NAME], RoutedAdapterConfig)
        assert model.peft_config[NAME].peft_type == "MOE_ADAPTER"
        assert "moe_adapter" in repr(model)

    def test_status(self):
        model = routed()
        model.add_adapter("second", config(r=2))
        status = get_model_status(model)
        assert status.peft_types == {NAME: "MOE_ADAPTER", "second": "MOE_ADAPTER"}
        assert sorted(status.available_adapters) == ["second", NAME]
        assert status.active_adapters == [NAME]
        assert status.merged_adapters == []
        assert status.enabled is True
        assert status.requires_grad == {NAME: True, "second": False}
        layers = get_layer_status(model)
        assert len(layers) == 2 * 3
        assert all(sorted(layer.available_adapters) == ["second", NAME] for layer in layers)

    def test_only_the_adapter_is_trained(self):
        model = routed()
        trained = {key for key, value in model.named_parameters() if value.requires_grad}
        assert trained
        assert all("moe_adapter_" in key for key in trained)
        count, total = model.get_nb_trainable_parameters()
        assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert total == sum(p.numel() for p in model.parameters())

    def test_base_state_dict_is_the_base(self):
        base = tiny_llama().state_dict()
        kept = routed().get_base_model().state_dict()
        bare = {key.replace(".base_layer", ""): value for key, value in kept.items() if "moe_adapter" not in key}
        assert bare.keys() == base.keys()
        assert all(torch.equal(bare[key], base[key]) for key in base)

    def test_layer_indexing(self):
        model = routed(layers_to_transform=[1], layers_pattern="layers")
        assert {key.split(".layers.")[1][0] for key, _ in model.named_parameters() if "moe_adapter" in key} == {"1"}
        every = routed(target_modules="all-linear", layers_to_transform=1)
        layers = [key for key, module in every.named_modules() if isinstance(module, RoutedLayer)]
        assert len(layers) == 7
        assert all(".layers.1." in key for key in layers)


class TestSeveral:
    def test_second_adapter_of_other_sizes(self):
        model = routed()
        first = logits(model)
        model.add_adapter("second", config(num_experts=2, top_k=1, r=5, target_modules=["q_proj", "down_proj"]))
        assert torch.equal(logits(model), first), "adding must not change what is active"
        model.set_adapter("second")
        assert torch.allclose(logits(model), base_logits(), atol=1e-6), "a fresh adapter changes nothing"
        wake(model, seed=5)
        second = logits(model)
        assert not torch.allclose(second, base_logits(), atol=1e-3)
        trained = {key for key, value in model.named_parameters() if value.requires_grad}
        assert trained
        assert all(".second." in key for key in trained)
        model.set_adapter(NAME)
        assert not torch.equal(logits(model), second)

    def test_two_active_adapters_add_up(self):
        model = tiny_llama().eval()
        model.add_adapter(config(target_modules=["down_proj"], layers_to_transform=[1]), "one")
        model.add_adapter(config(target_modules=["down_proj"], layers_to_transform=[1], r=2), "two")
        wake(model)
        outputs = {}
        (layer,) = [module for module in model.modules() if isinstance(module, RoutedLayer)]
        handle = layer.register_forward_hook(lambda m, a, y: outputs.__setitem__(tuple(model.active_adapters()), y))
        model.disable_adapters()
        plain = []
        other = layer.register_forward_hook(lambda m, a, y: plain.append(y))
        logits(model)
        other.remove()
        model.enable_adapters()
        for names in (["one"], ["two"], ["one", "two"]):
            model.set_adapter(names)
            logits(model)
        handle.remove()
        sums = outputs["one",] + outputs["two",] - plain[0]
        torch.testing.assert_close(outputs["one", "two"], sums, rtol=1e-4, atol=1e-5)

    def test_disable(self):
        model = routed()
        expected = logits(model)
        assert not torch.allclose(expected, base_logits(), atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(logits(model), base_logits())
            with model.disable_adapter():
                assert torch.equal(logits(model), base_logits())
        assert torch.equal(logits(model), expected)

    def test_delete_the_active_one(self):
        model = routed()
        model.add_adapter("second", config(r=2))
        with pytest.warns(UserWarning, match="was active"):
            model.delete_adapter(NAME)
        assert set(model.peft_config) == {"second"}
        assert model.active_adapters == ["second"]
        assert not [key for key in model.state_dict() if f".{NAME}." in key]
        assert torch.allclose(logits(model), base_logits(), atol=1e-6)
        model.delete_adapter("second")
        assert torch.equal(logits(model.base_model.model), base_logits())

    def test_delete_an_inactive_one(self):
        model = routed()
        expected = logits(model)
        model.add_adapter("second", config(r=2))
        model.delete_adapter("second")
        assert model.active_adapters == [NAME]
        assert not [key for key in model.state_dict() if ".second." in key]
        assert torch.equal(logits(model), expected)
        # the name is free again, with other sizes and other targets
        model.add_adapter("second", config(num_experts=3, target_modules=["k_proj"]))
        model.set_adapter("second")
        wake(model)
        assert not torch.equal(logits(model), expected)

    def test_unknown_names(self):
        model = routed()
        with pytest.raises(ValueError, match="unknown"):
            model.delete_adapter("unknown")
        with pytest.raises(ValueError, match="unknown"):
            model.set_adapter("unknown")

    @pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
    def test_merging_says_why_not(self, how):
        model = routed()
        expected = logits(model)
        with pytest.raises(RoutingError, match="collapse_to_lora"):
            getattr(model, how)()
        assert torch.equal(logits(model), expected)

    def test_unload(self):
        model = routed()
        inner = model.get_base_model()
        bare = model.unload()
        assert bare is inner
        assert torch.equal(logits(bare), base_logits())
        assert bare.state_dict().keys() == tiny_llama().state_dict().keys()
        for module in bare.modules():
            assert ATTRIBUTE not in module.__dict__
            assert _HOOKS not in module.__dict__
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert bare.config.to_dict() == tiny_llama().config.to_dict()
        # and it can be wrapped again
        assert not torch.equal(logits(routed(bare)), base_logits())

    def test_modules_to_save(self, tmp_path):
        model = routed(modules_to_save=["lm_head"]).train()
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save[NAME].weight.mul_(1.5)
        assert model.get_base_model().lm_head.modules_to_save[NAME].weight.requires_grad
        model.eval()
        expected = logits(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / NAME, adapter_name="x")
        assert torch.equal(logits(loaded.eval()), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), base_logits())


class TestNative:
    """transformers' own adapter methods, without a PeftModel."""

    def test_load_and_delete(self, tmp_path):
        wrapped = routed()
        wrapped.save_pretrained(tmp_path)
        for name in ("default", "x7"):
            model = tiny_llama().eval()
            model.load_adapter(str(tmp_path / NAME), adapter_name=name)
            assert model.active_adapters() == [name]
            assert torch.equal(logits(model.eval()), logits(wrapped)), name
            model.disable_adapters()
            assert torch.equal(logits(model), base_logits())
            model.enable_adapters()
            assert torch.equal(logits(model), logits(wrapped))
            model.delete_adapter(name)
            assert torch.equal(logits(model), base_logits())

    def test_save_from_native(self, tmp_path):
        model = tiny_llama().eval()
        model.add_adapter(config(), "one")
        wake(model)
        expected = logits(model)
        model.save_pretrained(tmp_path)
        twin = tiny_llama().eval()
        twin.load_adapter(str(tmp_path), adapter_name="two")
        assert torch.equal(logits(twin.eval()), expected)
        wrapped = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path)
        assert torch.equal(logits(wrapped.eval()), expected)

    @pytest.mark.parametrize("order", [("lora", "routed"), ("routed", "lora")])
    def test_with_lora_on_the_same_linear(self, order):
        model = tiny_llama().eval()
        configs = {"lora": LORA, "routed": config()}
        for name in order:
            model.add_adapter(configs[name], name)
        wake_banks(model)
        found = {}
        for active in (["lora"], ["routed"], ["lora", "routed"]):
            model.set_adapter(active)
            found[tuple(active)] = logits(model)
        different = list(found.values())
        assert not any(torch.allclose(a, b, atol=1e-3) for i, a in enumerate(different) for b in different[:i])
        model.disable_adapters()
        assert torch.allclose(logits(model), base_logits(), atol=1e-6)
        model.enable_adapters()
        model.set_adapter(["lora", "routed"])
        trained = model.train()(**batch_of())
        trained.loss.backward()
        reached = {key for key, value in model.named_parameters() if value.grad is not None}
        assert any("lora_" in key for key in reached)
        assert any("moe_adapter_bank" in key for key in reached)
        assert any("moe_adapter_router" in key for key in reached)
        model.eval()
        model.delete_adapter("routed")
        model.set_adapter("lora")
        alone = logits(model)
        torch.testing.assert_close(alone, found["lora",], rtol=1e-5, atol=1e-6)
        model.delete_adapter("lora")
        assert torch.allclose(logits(model), base_logits(), atol=1e-6)

    @pytest.mark.parametrize("order", [("lora", "routed"), ("routed", "lora")])
    def test_order_does_not_matter(self, order):
        results = []
        for names in (order, order[::-1]):
            model = tiny_llama().eval()
            for name in names:
                torch.manual_seed({"lora": 1, "routed": 2}[name])
                model.add_adapter({"lora": LORA, "routed": config()}[name], name)
            wake_banks(model)
            model.set_adapter(["lora", "routed"])
            results.append(logits(model))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class TestBadTargets:
    def test_no_match_names_the_linears(self):
        base = tiny_llama()
        with pytest.raises(ConfigError, match=r"q_prj.*Did you mean 'q_proj'.*gate_proj"):
            get_peft_model(base, config(target_modules=["q_prj"]))
        assert find_routing_state(base) is None
        assert torch.equal(logits(base.eval()), base_logits())

    def test_no_layer(self):
        with pytest.raises(ConfigError, match=r"in layers \[7\]"):
            get_peft_model(tiny_llama(), config(target_modules="all-linear", layers_to_transform=[7]))

    def test_not_a_linear(self):
        with pytest.raises(RoutingError, match="Embedding"):
            get_peft_model(tiny_llama(), config(target_modules=["embed_tokens"]))

    def test_adapters_of_one_model_share_the_balance_scope(self):
        model = routed()
        with pytest.raises(ConfigError, match="balance_scope"):
            model.add_adapter("second", config(balance_scope="global"))

    def test_unknown_balance_scope(self):
        with pytest.raises(ConfigError, match="balance_scope is 'world'"):
            config(balance_scope="world")


def test_a_copied_model_moves_its_own_step_state():
    model = routed(preset="loss_free")
    copied = copy.deepcopy(model).train()
    (before, *_) = [value.clone() for name, value in copied.named_parameters() if name.endswith("stepper.bias")]
    optimizer = torch.optim.SGD([value for value in copied.parameters() if value.requires_grad], lr=0.1)
    copied(**batch_of()).loss.backward()
    optimizer.step()
    (after, *_) = [value for name, value in copied.named_parameters() if name.endswith("stepper.bias")]
    (kept, *_) = [value for name, value in model.named_parameters() if name.endswith("stepper.bias")]
    assert not torch.equal(before, after)
    assert torch.equal(before, kept)


def test_auxiliary_losses_of_two_adapters_add_up_with_their_own_coefficients():
    model = tiny_llama()
    names = {"first": 0.01, "second": 2.0}
    for name, coefficient in names.items():
        model.add_adapter(config(losses={"switch": coefficient}, task_type=None), name)
    wake(model)
    model.train()
    totals = {}
    for active in ("first", "second", ["first", "second"]):
        model.set_adapter(active)
        # fresh adapters with B at 0 leave the hidden states alike, so that losses of one run compare with another's
        with torch.no_grad():
            for key, value in model.named_parameters():
                if key.endswith(".B"):
                    value.zero_()
        model(**batch_of())
        totals[str(active)] = weighted_routing_loss(model)
        (loss,) = routing_losses(model).values()
        assert 0.5 < float(loss) < 4
    assert_close("sum", totals["['first', 'second']"], totals["first"] + totals["second"])


class TestLayersCalledByHand:
    """Outside a pass of the model nothing is kept longer than a group of siblings needs it."""

    def attention(self):
        model = routed(target_modules=["q_proj", "k_proj", "v_proj"])
        return model.base_model.model.model.layers[0].self_attn, torch.randn(2, 5, 16)

    def test_again_after_training(self):
        attention, x = self.attention()
        first = attention.q_proj(x)
        first.sum().backward()
        with torch.no_grad():
            attention.q_proj.moe_adapter_router[NAME].scorer.weight.neg_()
        second = attention.q_proj(x)
        second.sum().backward()
        assert not torch.equal(first, second)

    def test_a_sibling_gets_a_graph_of_its_own(self):
        attention, x = self.attention()
        with torch.no_grad():
            attention.q_proj(x)
        assert attention.k_proj(x).requires_grad


def test_an_inner_block_of_inputs_adds_scalars_to_the_outer_one():
    model = routed()
    state = find_routing_state(model)
    with routing_inputs(model, mask_ratio=0.5, step=1.0), routing_inputs(model, step=2.0):
        assert state.inputs["scalars"] == {"mask_ratio": 0.5, "step": 2.0}
    assert state.inputs == {}
