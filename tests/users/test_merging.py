"""Merging the LoRAs of a base's experts, taking adapters off, and the dtype that PEFT gives an adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moe_kit import LayerRoutingConfig, RoutedAdapterConfig
from moe_kit.hf.hooks import _HOOKS
from moe_kit.routing.frozen import frozen_parameters
from moe_kit.routing.state import ATTRIBUTE
from tests.conformance.common import config, wake
from tests.tiny import batch_of, tiny_llama, tiny_moe
from tests.tolerances import assert_close
from tests.users.base_experts import STACKS, adapted

IDS = batch_of()["input_ids"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["lora", "routed"])
def test_without_its_adapter_a_merged_model_is_the_base(kind):
    model, base = adapted(kind, "Mixtral"), logits(tiny_moe("Mixtral").eval())
    expected = logits(model)
    model.merge_adapter()
    assert_close("merged", logits(model), expected)
    with model.disable_adapter():
        assert_close("disabled", logits(model), base)
    assert_close("enabled again", logits(model), expected)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("merge", [True, False])
def test_nothing_stays_behind(family, merge):
    model, clean = adapted(family=family), tiny_moe(family).eval()
    expected = logits(model) if merge else logits(clean)
    inner = model.get_base_model()
    assert inner._forward_hooks
    back = model.merge_and_unload() if merge else model.unload()
    assert back is inner
    assert_close("logits", logits(back), expected)
    for module in back.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not {_HOOKS, ATTRIBUTE} & module.__dict__.keys()
    assert back.config.to_dict() == clean.config.to_dict()
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in clean.named_parameters()]


METHODS = {
    "linears": lambda: config(scope="sequence"),
    "base experts": lambda: config(target_modules=["q_proj"], target_parameters=STACKS, modules_to_save=["lm_head"]),
    "layer router": lambda: LayerRoutingConfig.from_preset("flexi", budget=0.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_last_adapter_takes_everything_with_it(method):
    def base():
        return (tiny_moe("Mixtral") if method == "base experts" else tiny_llama(layers=4)).eval()

    clean, model = base(), get_peft_model(base(), METHODS[method]())
    model.add_adapter("second", METHODS[method]())
    inner = model.get_base_model()
    with pytest.warns(UserWarning, match="was active"):
        model.delete_adapter("default")
    assert _HOOKS in inner.__dict__
    model.delete_adapter("second")
    # PEFT's wrapper cannot be called without an adapter, LoRA's neither
    assert_close("logits", logits(inner.eval()), logits(clean))
    assert [(name, type(module)) for name, module in inner.named_modules()] == [
        (name, type(module)) for name, module in clean.named_modules()
    ]
    for module in inner.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not {_HOOKS, ATTRIBUTE, "generate", "generate_batch"} & module.__dict__.keys()
    assert inner.config.to_dict() == clean.config.to_dict()
    # the wrapper takes another one, which works as on a model that never had any
    model.add_adapter("third", METHODS[method]())
    model.set_adapter("third")
    fresh = get_peft_model(base(), METHODS[method](), adapter_name="third")
    wake(model)
    fresh.load_state_dict(model.state_dict())
    assert_close("logits", logits(model.eval()), logits(fresh.eval()))
    assert inner.peft_config.keys() == {"third"}
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3), fresh.generate(input_ids=IDS, max_new_tokens=3))


def half(kind, **more):
    torch.manual_seed(0)
    base = tiny_llama().to(torch.bfloat16)
    if kind == "lora":
        return get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "up_proj"]), **more)
    routed = RoutedAdapterConfig.from_preset(kind, num_experts=4, top_k=2, r=3, target_modules=["q_proj", "up_proj"])
    return get_peft_model(base, routed, **more)


def dtypes(model, part):
    return {value.dtype for name, value in model.named_parameters() if part in name}


@pytest.mark.parametrize("kind", ["lora", "mixture_of_lora", "hydralora", "flylora", "loss_free"])
def test_an_adapter_has_the_dtype_that_was_asked_for(kind, tmp_path):
    part = "lora_" if kind == "lora" else "moe_adapter_bank"
    assert dtypes(half(kind), part) == {torch.float32}
    model = half(kind, autocast_adapter_dtype=False)
    assert dtypes(model, part) == {torch.bfloat16}
    assert dtypes(model, "moe_adapter_router") <= {torch.float32}, "routers and their state stay"
    assert {value.dtype for value in frozen_parameters(model)} <= {torch.float32}
    model.train()(**batch_of()).loss.backward()
    model.save_pretrained(tmp_path)
    for autocast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        loaded = PeftModel.from_pretrained(
            tiny_llama().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast
        ).eval()
        assert dtypes(loaded, part) == {dtype}
        assert dtypes(loaded, "moe_adapter_router") <= {torch.float32}
        assert logits(loaded).isfinite().all()
    model.add_adapter("second", model.peft_config["default"], autocast_adapter_dtype=False)
    assert dtypes(model, part) == {torch.bfloat16}


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_of_a_base_follow_as_well(family):
    method = RoutedAdapterConfig.from_preset("mixture_of_lora", r=3, target_parameters=STACKS)
    model = get_peft_model(tiny_moe(family).to(torch.bfloat16), method, autocast_adapter_dtype=False)
    assert dtypes(model, "moe_adapter_bank") == {torch.bfloat16}
    model.train()(**batch_of()).loss.backward()
