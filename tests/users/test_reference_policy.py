"""Preference trainers build the reference policy by copying an adapter's parameters: it must be that adapter."""

import math
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moe_kit import LayerRoutingConfig, RoutedAdapterConfig, routing_inputs
from moe_kit.depth import set_budget
from moe_kit.routing.frozen import frozen_parameters
from tests.tiny import batch_of, tiny_llama, wake_banks
from tests.tolerances import assert_close
from tests.users.trainers import trl_trainer

TARGETS = ["q_proj", "v_proj", "up_proj"]
# beside the presets, the parts that a configuration can add to them
ROUTED = {
    **{name: {} for name in RoutedAdapterConfig.presets()},
    "expert_choice": {"causal_leak": "allow"},
    "expert_choice/ema": {"select_options": {"threshold": "ema"}},
    "mixture_of_lora/two_stage": {"stepper": "two_stage_entropy", "losses": {"maximise_token_entropy": 0.1}},
    "mixture_of_lora/freezes": {"router_freeze_after": 3},
    "mixture_of_lora/prototypes": {"score": "prototype", "score_options": {"trainable": False}},
    "mixture_of_lora/shared": {"router_sharing": "block"},
}
STATIC = {"skip_layers": [1], "layers": [1, 2]}
DEPTH = {"dr_llm": {}, "first": {}, "informed": {}, "flexi": {}, "mod": {}, "random": {}, "static/named": STATIC}


def routed_config(case="mixture_of_lora", **overrides):
    values = {"num_experts": 4, "top_k": 2, "r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    name = case.split("/")[0]
    if "mhr" in name or name == "poly":
        values |= {"num_tasks": 1} if name != "mhr_mu" else {}
        values |= {} if name == "poly" else {"bank_options": {"heads": 2}}
    if name == "mola":
        values["expert_layout"] = [2, 4]
    return RoutedAdapterConfig.from_preset(name, **{**values, **ROUTED.get(case, {}), **overrides})


def wake(model):
    """Random values for everything that an adapter has, its state included."""
    wake_banks(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "moe_adapter_router" in name or "moe_depth" in name:
                # positive: a strength, a number of steps
                value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return model


def add_reference(model):
    """What TRL does to a model that has been trained before."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, value in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(value.data)
    model.eval()


def logits(model, adapter):
    model.set_adapter(adapter)
    with torch.no_grad(), inputs(model):
        return model(input_ids=batch_of()["input_ids"]).logits


def inputs(model):
    scope = getattr(model.peft_config["default"], "scope", None)
    return routing_inputs(model, task_ids=[0, 0]) if scope == "task" else nullcontext()


@pytest.mark.parametrize("case", [*ROUTED, *DEPTH, "lora"])
def test_a_copy_of_the_parameters_is_the_adapter(case):
    if case == "lora":
        config = LoraConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM")
    elif case in DEPTH:
        config = LayerRoutingConfig.from_preset(case.split("/")[0], task_type="CAUSAL_LM", **DEPTH[case])
    else:
        config = routed_config(case)
    model = wake(get_peft_model(tiny_llama(4), config)).eval()
    if case == "static/named":
        set_budget(model.base_model.model, 0.5)
    add_reference(model)
    assert torch.equal(logits(model, "ref"), logits(model, "default"))
    assert not [name for name, _ in model.named_buffers() if "moe_" in name]


def test_layers_that_are_skipped_now_are_skipped_by_the_reference():
    config = LayerRoutingConfig.from_preset("static", **{**STATIC, "skip_layers": None, "budget": 0.0})
    model = get_peft_model(tiny_llama(4), config).eval()
    whole = logits(model, "default")
    with torch.no_grad():
        set_budget(model, 0.5)
    add_reference(model)
    assert torch.equal(logits(model, "ref"), logits(model, "default"))
    assert not torch.equal(logits(model, "ref"), whole)


@pytest.mark.parametrize("case", ["loss_free", "flylora", "remoe", "expert_choice/ema", "mixture_of_lora"])
def test_dpo_starts_at_its_reference_which_stays(case, tmp_path):
    # without auxiliary losses the first loss of DPO is log 2
    model = wake(get_peft_model(tiny_llama(), routed_config(case, losses={})))
    model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    trainer = trl_trainer("DPO", model, tmp_path, max_steps=3, gradient_checkpointing=True)
    before = {name: value.clone() for name, value in model.state_dict().items() if "moe_adapter" in name}
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-4)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    moved = {
        name for name, value in model.state_dict().items() if name in before and not torch.equal(value, before[name])
    }
    assert not [name for name in moved if ".ref." in name]
    assert [name for name in moved if name.endswith(".default.B")]
    if case != "mixture_of_lora":
        assert [name for name in moved if "stepper" in name or "select" in name], "the policy's state moves"


@pytest.mark.parametrize("case", ["loss_free", "flylora", "remoe", "expert_choice/ema", "mixture_of_lora/two_stage"])
def test_what_nothing_trains_never_gets_a_gradient(case):
    model = wake(get_peft_model(tiny_llama(), routed_config(case, dropout=0.0)))
    model.add_adapter("second", routed_config(case))
    frozen = frozen_parameters(model)
    assert frozen

    def check(what):
        assert not any(value.requires_grad for value in frozen_parameters(model)), what

    check("a fresh adapter")
    for name in ("second", "default"):
        model.set_adapter(name)
        check("set_adapter")
    with model.disable_adapter():
        check("disable_adapter")
    check("and after it")
    model.set_requires_grad(["default", "second"])
    check("set_requires_grad")
    model.base_model.enable_adapter_layers()
    check("enable_adapter_layers")
    model.requires_grad_(True).train()
    check("requires_grad_ and train")
    model.to(torch.bfloat16).float()
    check("a cast")
    model.requires_grad_(True)
    before = [value.clone() for value in frozen]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.5)
    with inputs(model):
        model(**batch_of()).loss.backward()
    assert not any(value.grad is not None for value in frozen), "nor if somebody insists"
    assert {id(value) for value in frozen} == {id(value) for value in frozen_parameters(model)}
    assert all(torch.equal(a, b) for a, b in zip(before, frozen))
    del optimizer


def test_frozen_values_stay_float32_in_a_half_precision_model():
    for case in ("loss_free", "flylora", "expert_choice/ema"):
        model = get_peft_model(tiny_llama().to(torch.bfloat16), routed_config(case)).to(torch.bfloat16)
        assert {value.dtype for value in frozen_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("case", ["loss_free", "flylora", "remoe", "expert_choice/ema", "mixture_of_lora/two_stage"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_files_with_scalars_load(case, low_memory, tmp_path):
    """Older files hold numbers without a dimension, under the same keys."""
    model = wake(get_peft_model(tiny_llama(), routed_config(case))).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    numbers = ("strength", "steps", "average", "streak", "switched_at")
    state = {name: v[0].clone() if name.endswith(numbers) else v for name, v in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert_close("logits", logits(loaded, "default"), logits(model, "default"))
    again = loaded.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("low_memory", [False, True])
def test_files_with_whole_numbered_actions_load(low_memory, tmp_path):
    model = get_peft_model(tiny_llama(4), LayerRoutingConfig.from_preset("static", **STATIC)).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value[0].long() for name, value in load_file(file).items()}, file, {"format": "pt"})
    loaded = PeftModel.from_pretrained(tiny_llama(4), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(logits(loaded, "default"), logits(model, "default"))
    assert {value.dtype for value in frozen_parameters(loaded)} == {torch.float32}


def test_experts_from_elsewhere_are_copied(tmp_path):
    folders = []
    for index in range(2):
        lora = get_peft_model(tiny_llama(), LoraConfig(r=2 + index, target_modules=TARGETS))
        for name, value in lora.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.3)
        lora.save_pretrained(tmp_path / str(index))
        folders.append(str(tmp_path / str(index)))
    config = RoutedAdapterConfig.from_preset("mixture_of_lora", from_adapters=folders, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config).eval()
    add_reference(model)
    assert torch.equal(logits(model, "ref"), logits(model, "default"))
    banks = [value for name, value in model.named_parameters() if "moe_adapter_bank" in name]
    assert banks
    assert not any(value.requires_grad for value in banks)
