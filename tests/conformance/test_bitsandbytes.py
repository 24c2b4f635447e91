"""A base quantised by bitsandbytes: the adapter needs nothing of its linears but their call.

The same without a GPU, for linears and weights quantised by hand: `test_generation.py`, `TestPrecision`.
"""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conformance.common import NAME, config, gradients, wake
from tests.tiny import batch_of, tiny_llama

DEVICE = "cuda"
QUANTISED = {
    "int8": dict(load_in_8bit=True),
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}
# 4-bit blocks and int8 tiles want widths that they divide
WIDE = dict(width=64, intermediate_size=128)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", QUANTISED)
def test_forward_and_backward(tmp_path, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, and a GPU")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tiny_llama(**WIDE).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**QUANTISED[kind]), device_map={"": DEVICE}
    )
    linear = bitsandbytes.nn.Linear8bitLt if kind == "int8" else bitsandbytes.nn.Linear4bit
    assert sum(isinstance(module, linear) for module in base.modules()) == 2 * 7
    batch = {key: value.to(DEVICE) for key, value in batch_of().items()}
    with torch.no_grad():
        plain = base(**batch).logits

    model = get_peft_model(base, config(target_modules="all-linear"), adapter_name=NAME).eval()
    assert len([key for key, _ in model.named_modules() if key.endswith("moe_adapter_bank")]) == 2 * 7
    # without a graph on both sides: bitsandbytes has other kernels with one
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain, rtol=0, atol=1e-2)
    wake(model)
    model.train()(**batch).loss.backward()
    with torch.no_grad():
        assert (model.eval()(**batch).logits - plain).abs().max() > 0.1
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, plain, rtol=0, atol=1e-2)

    found = gradients(model)
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert found.keys() == trained
    assert {key.split(".")[-1] for key in found} == {"A", "B", "weight"}
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in found.values())
