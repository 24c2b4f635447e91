"""Models whose weights lie elsewhere until a module is called: accelerate's offloading, hooks, functional calls."""

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model

from moe_kit import RoutedAdapterConfig
from moe_kit.adapters.base_experts import AdaptedExperts
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.routing import Router
from moe_kit.routing.plain import is_untouched
from tests.tiny import tiny_llama, tiny_moe
from tests.tolerances import assert_close

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(4))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CPU = torch.device("cpu")


def awake(model):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ("moe_adapter_bank" in name and name.endswith(".B")) or "lora_B" in name or "moe_adapter_router" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * (1.0 if "router" in name else 0.3))
    return model.eval()


def config(kind, experts=False):
    if kind == "lora":
        if experts:
            return LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["mlp." + name for name in EXPERTS])
        return LoraConfig(r=3, target_modules=LINEARS, task_type="CAUSAL_LM")
    more = {"target_modules": ["q_proj"], "target_parameters": EXPERTS} if experts else {"target_modules": LINEARS}
    return RoutedAdapterConfig.from_preset(kind, num_experts=4, top_k=2, r=3, task_type="CAUSAL_LM", **more)


def adapted(kind, base):
    return awake(
        get_peft_model(tiny_llama() if base == "dense" else tiny_moe("Qwen3Moe"), config(kind, base == "experts"))
    )


@torch.no_grad()
def outputs(model):
    """A prompt, and tokens one by one with a cache."""
    cached = model(input_ids=IDS[:1, :4])
    steps = [model(input_ids=IDS[:1, at : at + 1], past_key_values=cached.past_key_values).logits for at in range(4, 7)]
    return torch.cat([model(input_ids=IDS).logits.flatten(), cached.logits.flatten(), *(s.flatten() for s in steps)])


@pytest.fixture(autouse=True)
def always_decode(monkeypatch):
    """At a tiny model's widths the cost model would take all experts at once."""
    from moe_kit_kernels.lora_experts import dispatch

    def form(x, *sizes, training, **_):
        return "dense" if training or len(x) > 2 else "decode"

    monkeypatch.setattr(dispatch, "chosen_form", form)


KINDS = ["lora", "mixture_of_lora", "loss_free", "hydralora", "flylora"]


@pytest.mark.parametrize("base", ["dense", "experts"])
@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_offloading(kind, way, base, tmp_path):
    """Equal to the model in memory, exactly as plain LoRA is; also once it had decoded there before."""
    if kind == "lora" and base == "experts":
        pytest.skip("PEFT's LoRA on parameters does not run offloaded")
    model = adapted(kind, base)
    expected = outputs(model)
    if way == "cpu":
        cpu_offload(model.get_base_model(), execution_device=CPU)
    else:
        disk_offload(model.get_base_model(), str(tmp_path), execution_device=CPU)
    offloaded = [name for name, value in model.named_parameters() if value.is_meta]
    assert any("lora_A" in name or "moe_adapter" in name for name in offloaded)
    assert_close("logits", outputs(model), expected)


@pytest.mark.parametrize("kind", ["lora", "mixture_of_lora"])
def test_device_map(kind, tmp_path):
    """A base that accelerate placed, every module of it hooked, and an adapter on top."""
    tiny_llama().save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = awake(get_peft_model(load(tmp_path / "base", dtype=torch.float32), config(kind)))
    expected = outputs(model)
    model.save_pretrained(tmp_path / "adapter")
    base = load(tmp_path / "base", dtype=torch.float32, device_map={"model.layers": "cpu", "": "cpu"}).eval()
    assert_close("logits", outputs(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), expected)
    # and moved to the disk as it is
    placed = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    disk_offload(placed.get_base_model(), str(tmp_path / "off"), execution_device=CPU)
    assert_close("logits", outputs(placed), expected)


@pytest.mark.parametrize("kind", ["lora", "mixture_of_lora"])
def test_functional_call(kind):
    """Other tensors in the place of all parameters are what counts."""
    model = adapted(kind, "dense")
    other = adapted(kind, "dense")
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.1)
        expected = other(input_ids=IDS).logits
        values = {name: value.detach() for name, value in other.named_parameters()}
        model(input_ids=IDS[:1, :1])
        found = torch.func.functional_call(model, values, kwargs={"input_ids": IDS}).logits
        token = torch.func.functional_call(model, values, kwargs={"input_ids": IDS[:1, :1]}).logits
        assert_close("token", token, other(input_ids=IDS[:1, :1]).logits)
    assert_close("logits", found, expected)


def parts(model):
    """Modules whose tensors some fused operator reads past their call."""
    layer = next(module for module in model.modules() if isinstance(module, RoutedLayer))
    found = {"base": layer.base_layer, "bank": layer.moe_adapter_bank["default"]}
    router = next(module for module in model.modules() if isinstance(module, Router))
    found |= {"router": router, "scorer": router.scorer, "select": router.select}
    return found


TOUCHES = {
    "forward hook": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "forward pre-hook": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "replaced forward": lambda module, seen: setattr(
        module, "forward", lambda *a, own=module.forward, **k: (seen.append(1), own(*a, **k))[1]
    ),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("part", ["base", "bank", "router", "scorer", "select"])
def test_whoever_stands_in_between_is_asked(part, touch, gradients):
    """Prompt, single token and training pass, also after a step was looked up."""
    model = adapted("mixture_of_lora", "dense")
    with torch.set_grad_enabled(gradients):
        for ids in (IDS, IDS[:1, :1], IDS[:1, :1]):
            model(input_ids=ids)
        module, seen = parts(model)[part], []
        assert is_untouched(module)
        TOUCHES[touch](module, seen)
        assert not is_untouched(module)
        for ids in (IDS, IDS[:1, :1]):
            before = len(seen)
            model(input_ids=ids)
            assert len(seen) > before, f"{part} was passed by"


def test_hooks_on_the_experts_of_a_block():
    model = adapted("mixture_of_lora", "experts")
    expected = model(input_ids=IDS).logits
    seen = []
    for module in model.modules():
        if isinstance(module, AdaptedExperts):
            module.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert_close("logits", model(input_ids=IDS).logits, expected)
    assert len(seen) == 2
