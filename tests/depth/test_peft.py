"""Layer routers as a PEFT method: save, load, unload, together with LoRA and routed adapters in either order."""

import copy
import json
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from moe_kit import (
    CheckpointError,
    ConfigError,
    LayerRoutingConfig,
    RoutedAdapterConfig,
    RoutingError,
    load_adapters,
    save_adapters,
)
from moe_kit.depth import force_layers, layer_applications
from tests.depth.families import padded_batch, tiny
from tests.depth.test_routers import scramble

PRESETS = LayerRoutingConfig.presets()
ROUTED = dict(num_experts=3, top_k=2, r=2, target_modules=["q_proj", "up_proj"])


def randomize(model, seed=4):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "moe_adapter" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return scramble(model)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_save_and_load_are_exact(preset, tmp_path):
    base, batch = tiny(), padded_batch((12, 7))
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LayerRoutingConfig.from_preset(preset), adapter_name="other").eval()
    scramble(model)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    folder = tmp_path / "adapter" / "other"
    assert json.loads((folder / "adapter_config.json").read_text())["preset"] == preset
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder, adapter_name="third"
    ).eval()
    assert torch.equal(again(**batch).logits, expected)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(folder).eval()(**batch).logits, expected)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(str(folder), adapter_name="x")
    assert torch.equal(native.eval()(**batch).logits, expected)


@torch.no_grad()
def test_disable_switch_delete_unload_and_copies():
    base, batch = tiny(), padded_batch((12, 7))
    names = [name for name, _ in base.named_modules()]
    classes = [type(module) for module in base.modules()]
    plain = base(**batch).logits
    model = scramble(get_peft_model(base, LayerRoutingConfig()).eval())
    routed = model(**batch).logits
    assert not torch.equal(routed, plain)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, plain)
    assert [type(m).__name__ for m in base.modules() if type(m).__name__ == "LlamaDecoderLayer"] == [
        "LlamaDecoderLayer"
    ] * 5
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(**batch).logits, routed)
        assert torch.equal(clone.generate(**batch, max_new_tokens=3), model.generate(**batch, max_new_tokens=3))
    model.add_adapter("static", LayerRoutingConfig.from_preset("static", budget=0.5))
    model.set_adapter("static")
    model(**batch)
    assert layer_applications(model)[0].tolist() == [1, 1, 0, 1, 0]
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, routed)
    model.base_model.set_adapter(["default", "static"])
    with pytest.raises(RoutingError, match="two layer routers"):
        model(**batch)
    model.set_adapter("default")
    model.delete_adapter("static")
    assert torch.equal(model(**batch).logits, routed)
    with pytest.raises(ConfigError, match="cannot be merged"):
        model.merge_and_unload()
    bare = model.unload()
    assert [name for name, _ in bare.named_modules()] == names
    assert [type(module) for module in bare.modules()] == classes
    assert torch.equal(bare(**batch).logits, plain)
    assert "generate" not in bare.__dict__


@pytest.mark.parametrize(
    "order", [("lora", "depth", "routed"), ("depth", "routed", "lora"), ("routed", "lora", "depth")]
)
@torch.no_grad()
def test_three_kinds_together_in_any_order(order, tmp_path):
    configs = {
        "lora": lambda: LoraConfig(r=2, target_modules=["k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
        "depth": LayerRoutingConfig,
        "routed": lambda: RoutedAdapterConfig.from_preset("mixture_of_lora", **ROUTED),
    }
    batch = padded_batch((12, 7))
    model = tiny()
    for name in order:
        model.add_adapter(configs[name](), name)
    model.set_adapter(list(order))
    randomize(model.eval())
    linears = [name for name, _ in model.named_modules() if name.endswith("lora_A.lora")]
    assert len(linears) == 5 * 5
    expected, routes = model(**batch).logits, layer_applications(model)
    assert (routes != 1).any()
    assert save_adapters(model, tmp_path) == order
    again = tiny()
    assert load_adapters(again, tmp_path) == order
    assert torch.equal(again.eval()(**batch).logits, expected)
    assert torch.equal(layer_applications(again), routes)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    # the depth adapter alone is what it is without the others
    again.set_adapter("depth")
    alone = tiny()
    alone.load_adapter(str(tmp_path / "depth"), adapter_name="depth")
    assert torch.equal(again(**batch).logits, alone.eval()(**batch).logits)
    greedy = dict(max_new_tokens=5, do_sample=False)
    again.set_adapter(list(order))
    assert torch.equal(again.generate(**batch, **greedy), model.generate(**batch, **greedy, use_cache=False))


def test_training_lora_leaves_frozen_routers_alone():
    model, batch = tiny(), padded_batch((12, 7))
    model.add_adapter(LayerRoutingConfig.from_preset("first"), "depth")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "lora")
    model.set_adapter(["depth", "lora"])
    scramble(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    before = {n: p.clone() for n, p in model.named_parameters() if "moe_depth" in n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    # the LoRA of layers that run learns
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_damaged_folders_are_refused(tmp_path):
    model = tiny()
    model.add_adapter(LayerRoutingConfig(), "depth")
    save_adapters(model, tmp_path)
    with pytest.raises(CheckpointError, match="expected a folder that save_adapters wrote"):
        load_adapters(tiny(), tmp_path / "none")
    with pytest.raises(CheckpointError, match="already has an adapter"):
        load_adapters(model, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapters(_wider(), tmp_path)
    weights = tmp_path / "depth" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot read adapter 'depth'"):
        load_adapters(tiny(), tmp_path)
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_adapters(tiny(), tmp_path)


def _wider():
    from transformers import LlamaForCausalLM

    from tests.depth.families import CONFIGS

    config = CONFIGS["llama"]()
    config.hidden_size, config.head_dim = 64, 16
    return LlamaForCausalLM(config)


def test_model_without_decoder_layers_says_what_was_looked_for():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ConfigError, match="looked for one ModuleList of num_hidden_layers = 2"):
        get_peft_model(model, LayerRoutingConfig())


def test_force_needs_layer_routers():
    with pytest.raises(RoutingError, match="no layer routers"), force_layers(tiny(), [[1] * 5]):
        pass
