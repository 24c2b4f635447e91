"""LoRAs on the experts of a mixture-of-experts base act wherever the base's weights come from."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch.nn.utils import parametrize

from moe_kit import RoutingError
from moe_kit.adapters.base_experts import AdaptedExperts
from tests.tolerances import assert_close
from tests.users.base_experts import adapted

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(4))


def logits(model):
    return model(input_ids=IDS).logits


def experts(model):
    return [module for module in model.modules() if isinstance(module, AdaptedExperts)]


@pytest.mark.parametrize("kind", ["lora", "routed"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_weights_given_from_outside(kind, family):
    if (kind, family) == ("lora", "GptOss"):
        pytest.skip("PEFT's LoRA takes no experts with biases")
    model = adapted(kind, family)
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = torch.func.functional_call(model, values, kwargs=dict(input_ids=IDS)).logits
    assert torch.equal(found, logits(model))
    with model.disable_adapter():
        assert (logits(model) - found).abs().max() > 0.1


def test_gradients_of_given_weights():
    model = adapted().train()
    loss = logits(model).square().mean()
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    expected = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    given = {
        name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in model.named_parameters()
    }
    loss = torch.func.functional_call(model, given, kwargs=dict(input_ids=IDS)).logits.square().mean()
    found = torch.autograd.grad(loss, [given[name] for name in names])
    for name, one, two in zip(names, found, expected):
        assert_close(name, one, two)


def test_parametrised_experts():
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    doubled, model = adapted(), adapted()
    for one, two in zip(experts(doubled), experts(model)):
        with torch.no_grad():
            one.base_layer.down_proj *= 2
        parametrize.register_parametrization(two.base_layer, "down_proj", Doubled())
    assert torch.equal(logits(model), logits(doubled))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_experts(offload, dropout, tmp_path):
    model = adapted(dropout=dropout)
    expected = logits(model)
    away, device = copy.deepcopy(model), torch.device("cpu")
    if offload == "cpu":
        cpu_offload(away.get_base_model(), execution_device=device)
    else:
        disk_offload(away.get_base_model(), str(tmp_path), execution_device=device)
    assert experts(away)[0].base_layer.down_proj.is_meta
    assert_close("logits", logits(away), expected)
    assert experts(away)[0].base_layer.down_proj.is_meta, "brought for the pass only"


def test_hooks_of_the_experts_run():
    """Tools that gather weights do it in hooks of the module that holds them."""
    model, seen = adapted(), []
    expected = logits(model)
    for module in experts(model):
        weight = module.base_layer.down_proj
        kept = weight.detach().clone()
        weight.data.zero_()

        def gather(module, args, weight=weight, kept=kept):
            weight.data.copy_(kept)
            seen.append("in")

        def release(module, args, output, weight=weight):
            weight.data.zero_()
            seen.append("out")

        module.base_layer.register_forward_pre_hook(gather)
        module.base_layer.register_forward_hook(release)
    with torch.no_grad():
        assert torch.equal(logits(model), expected)
    assert seen == ["in", "out"] * len(experts(model))
    assert all("forward" not in module.base_layer.__dict__ for module in experts(model))


def test_what_is_no_stack_is_refused():
    """A flattened or partitioned weight must not mean the base alone."""
    model = adapted()
    module = experts(model)[0].base_layer
    flat = module._parameters.pop("down_proj").detach().flatten()
    module.down_proj = flat
    with pytest.raises(RoutingError, match="target_parameters"):
        logits(model)
