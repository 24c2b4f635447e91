"""Whoever flattens, reshapes, shards or writes parameters as they lie in memory finds them contiguous, and so their gradients."""

import copy

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from moe_kit_kernels import lora_experts
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from moe_kit.experts.bank import Bank
from tests.adapters.rule_cases import CASES
from tests.tiny import batch_of, tiny_llama, wake_banks
from tests.tolerances import assert_close


def lora():
    model = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"]))
    return model.train()


def routed():
    return CASES["mixture_of_lora"].model().train()


MODELS = {"plain LoRA": lora, "routed": routed}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def trained(model):
    return [value for value in model.parameters() if value.requires_grad]


@pytest.mark.parametrize("case", CASES)
def test_every_preset_keeps_and_differentiates_plain_memory(case):
    model = CASES[case].model()
    with CASES[case].inputs(model, range(2)):
        model(**batch_of()).loss.backward()
    for name, value in model.state_dict().items():
        assert value.is_contiguous(), name
    for name, value in model.named_parameters():
        assert value.grad is None or value.grad.is_contiguous(), f"gradient of {name}"


def test_as_they_lie(model):
    """What Muon, ZeRO and the like do."""
    for value in trained(model):
        assert value.view(value.shape[0], -1).data_ptr() == value.data_ptr()
    expected = model(**batch_of()).loss
    flat = parameters_to_vector(trained(model))
    # every parameter becomes a view of one buffer
    vector_to_parameters(flat.clone(), trained(model))
    torch.testing.assert_close(model(**batch_of()).loss, expected, rtol=0, atol=0)
    model(**batch_of()).loss.backward()
    assert all(value.grad.view(-1).numel() for value in trained(model))


def test_safetensors(model, tmp_path):
    state = model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "all.safetensors")
    read = safetensors.torch.load_file(tmp_path / "all.safetensors")
    assert all(torch.equal(read[name], value) for name, value in state.items())
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))


def test_accelerate(model, tmp_path):
    accelerator = Accelerator(cpu=True)
    prepared, _ = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-3))
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(prepared, tmp_path / "model")
    expected = {name: value.clone() for name, value in prepared.state_dict().items()}
    with torch.no_grad():
        for value in prepared.parameters():
            value += 1
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(value, expected[name]) for name, value in prepared.state_dict().items())


def test_distributed_checkpoint(model, tmp_path):
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    dcp.save(model.state_dict(), checkpoint_id=tmp_path)
    state = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(state, checkpoint_id=tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def transposed(model):
    """The model as versions before kept it: B in memory as [E, L, O]."""
    made = 0
    for bank in model.modules():
        if isinstance(bank, Bank) and "B" in bank._parameters and bank.B.dim() == 3 and bank.B.shape[2] > 1:
            bank.B.data = bank.B.data.transpose(1, 2).contiguous().transpose(1, 2)
            made += not bank.B.is_contiguous()
    assert made
    return model


def test_states_that_were_saved_before(tmp_path):
    """A pickled state keeps strides: it loads into plain memory. A model that holds such tensors is right too."""
    model = routed()
    old = transposed(copy.deepcopy(model))
    torch.save(old.state_dict(), tmp_path / "state.pt")
    loaded = routed()
    wake_banks(loaded, std=1.0)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
    results = []
    for each in (model, old, loaded):
        each(**batch_of()).loss.backward()
        results.append([each(**batch_of()).logits, *(value.grad for value in trained(each))])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert_close("result", found, expected)
    assert all(value.is_contiguous() for value in loaded.parameters())
    old.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(CASES["mixture_of_lora"].base(), tmp_path / "adapter" / "skills_a")
    assert_close("logits", again(**batch_of()).logits, results[0][0])


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that an operation allocated."""

    def __init__(self, *given):
        super().__init__()
        self.given, self.numbers = {tensor.untyped_storage().data_ptr() for tensor in given}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize("backend", ["auto", "dense", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_few_tokens_copy_no_bank(tokens, dtype, backend):
    """Nothing of the bank's size is allocated for a result of a few rows."""
    E, O, L, D = 64, 2048, 16, 64
    x, ids, weights = torch.randn(tokens, D, dtype=dtype), torch.rand(tokens, E).topk(2).indices, torch.rand(tokens, 2)
    A, B = torch.randn(E, L, D), torch.randn(E, O, L)
    with torch.no_grad(), Largest(x, A, B) as mode:
        lora_experts(x, A, B, ids, weights, backend=backend)
    assert mode.numbers < E * O * L / 8
