"""Routers compute in float32 whatever the base does; loading on the meta device first changes nothing."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_kit import LayerRoutingConfig, load_adapters, save_adapters
from moe_kit.depth import layer_applications
from moe_kit.depth.routers import ActionRouter, Forecaster
from tests.depth.families import padded_batch, tiny
from tests.depth.test_routers import routed, scramble

GREEDY = dict(max_new_tokens=4, do_sample=False)
LEARNED = ("dr_llm", "first", "informed", "flexi", "mod")


def dtypes(model):
    return {parameter.dtype for name, parameter in model.named_parameters() if "moe_depth" in name}


def half(preset):
    return scramble(get_peft_model(tiny().to(torch.bfloat16), LayerRoutingConfig.from_preset(preset)).eval())


@pytest.mark.parametrize("preset", LEARNED)
@torch.no_grad()
def test_a_half_precision_base_keeps_float32_routers(preset, tmp_path):
    batch, model = padded_batch((9, 6)), half(preset)
    assert dtypes(model) == {torch.float32}
    expected = model(**batch).logits
    assert expected.dtype == torch.bfloat16
    applied = layer_applications(model)
    assert model.generate(**batch, **GREEDY).shape == (2, 13)
    native = tiny().to(torch.bfloat16)
    native.add_adapter(LayerRoutingConfig.from_preset(preset), "depth")
    scramble(native.eval())
    assert torch.equal(native(**batch).logits, expected)
    assert torch.equal(layer_applications(native), applied)
    save_adapters(native, tmp_path)
    again = tiny().to(torch.bfloat16)
    load_adapters(again, tmp_path)
    assert dtypes(again) == {torch.float32}
    assert torch.equal(again.eval()(**batch).logits, expected)


@pytest.mark.parametrize(
    ("preset", "dtype"), [*((preset, torch.bfloat16) for preset in LEARNED), ("informed", torch.float16)]
)
@torch.no_grad()
def test_casting_the_whole_model_still_decides_in_float32(preset, dtype):
    batch, model = padded_batch((9, 6)), routed(preset).to(dtype)
    assert dtypes(model) == {dtype}
    logits = model(**batch).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert model.generate(**batch, **GREEDY).shape == (2, 13)


@torch.no_grad()
def test_the_arithmetic_is_that_of_the_cast_weights_in_float32():
    router = ActionRouter(LayerRoutingConfig(), 32)
    forecaster = Forecaster(32, 8)
    for module in (router, forecaster):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
            parameter.copy_(parameter.to(torch.bfloat16))
    x = torch.randn(3, 32)
    expected = router.scorer(x), forecaster(x)
    router.to(torch.bfloat16), forecaster.to(torch.bfloat16)
    assert torch.equal(router.scorer(x), expected[0])
    assert torch.equal(forecaster(x), expected[1])


def test_a_cast_model_trains_its_routers():
    batch = padded_batch((9, 6))
    model = routed("first").to(torch.bfloat16).train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "moe_depth_router" in n]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("preset", ["dr_llm", "informed", "static", "mod", "random"])
@torch.no_grad()
def test_loading_with_little_memory(preset, tmp_path):
    batch, model = padded_batch((9, 6)), routed(preset)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    cast = PeftModel.from_pretrained(tiny().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=True).eval()
    assert dtypes(cast) <= {torch.float32}
    assert cast(**batch).logits.isfinite().all()
