"""What is saved can be loaded: formats, and modules of the base that are saved with an adapter under any name."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moe_kit import CheckpointError, ConfigError, LayerRoutingConfig, RoutedAdapterConfig
from moe_kit.hf.module_names import INNER
from tests.tiny import batch_of, tiny_llama, tiny_moe

TARGETS = ["q_proj", "v_proj"]


def routed(**overrides):
    values = {"num_experts": 3, "top_k": 2, "r": 2, "target_modules": TARGETS}
    return RoutedAdapterConfig.from_preset("mixture_of_lora", **{**values, **overrides})


CONFIGS = {
    "lora": lambda **more: LoraConfig(r=2, target_modules=TARGETS, **more),
    "routed": routed,
    "depth": lambda **more: LayerRoutingConfig.from_preset("dr_llm", **more),
    "static": lambda **more: LayerRoutingConfig.from_preset("static", **more),
}


@pytest.mark.parametrize("kind", ["routed", "depth", "static"])
@pytest.mark.parametrize("how", ["by name", "by place", "selected"])
def test_a_pickle_is_refused_before_anything_is_written(kind, how, tmp_path):
    model = get_peft_model(tiny_llama(4), CONFIGS[kind](), adapter_name="default")
    target = tmp_path / "adapter"
    options = {
        "by name": ((), {"safe_serialization": False}),
        "by place": ((False,), {}),
        "selected": ((False, ["default"]), {}),
    }
    args, kwargs = options[how]
    with pytest.raises(CheckpointError, match="safe_serialization"):
        model.save_pretrained(str(target), *args, **kwargs)
    assert not target.exists()
    model.save_pretrained(str(target))
    PeftModel.from_pretrained(tiny_llama(4), target)


def test_other_methods_may_still_write_one(tmp_path):
    get_peft_model(tiny_llama(), CONFIGS["lora"]()).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(16))

    def forward(self, x):
        return x @ self.weight


def base_with(name):
    """A model whose MLPs end in a further module of this name."""
    base = tiny_llama(4)
    for layer in base.model.layers:
        layer.mlp.add_module(name, Head())
        layer.mlp.register_forward_hook(lambda module, args, output, name=name: getattr(module, name)(output))
    return base


NAMES = [
    "regressor",
    "lora_head",
    "moe_adapter_head",
    "moe_depth_head",
    "scorer",
    "select",
    "up",
    "moe_adapter_router",
    "bank",
]


@pytest.mark.parametrize("kind", ["lora", "routed", "depth"])
@pytest.mark.parametrize("name", NAMES)
def test_modules_of_any_name_are_saved_and_loaded(kind, name, tmp_path):
    model = get_peft_model(base_with(name), CONFIGS[kind](modules_to_save=[name])).eval()
    trained = {key: value for key, value in model.named_parameters() if f".{name}.modules_to_save." in key}
    assert len(trained) == 4
    assert all(value.requires_grad for value in trained.values())
    assert len([key for key, _ in model.named_parameters() if ".modules_to_save." in key]) == 4, "and nothing of ours"
    with torch.no_grad():
        for value in trained.values():
            value.add_(torch.randn(16, 16) * 0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_with(name), tmp_path).eval()
    ids = batch_of()["input_ids"]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert all(torch.equal(loaded.get_parameter(key), value) for key, value in trained.items())


def test_a_second_adapter_saves_its_own(tmp_path):
    model = get_peft_model(base_with("scorer"), routed(modules_to_save=["scorer"]))
    model.add_adapter("second", routed(modules_to_save=["scorer"]))
    keys = [key for key, _ in model.named_parameters() if "modules_to_save" in key]
    assert len(keys) == 8
    assert all(".mlp.scorer." in key for key in keys)


def test_a_name_of_ours_alone_is_refused():
    with pytest.raises(ConfigError, match="scorer"):
        get_peft_model(tiny_llama(), routed(modules_to_save=["scorer"]))


def test_stacks_of_experts_keep_their_adapters():
    """DeepSeek has dense MLPs: their `down_proj` is meant, and not the LoRAs on the experts' stacks of that name."""
    config = routed(target_modules=None, target_parameters=["experts.down_proj"], modules_to_save=["down_proj"])
    model = get_peft_model(tiny_moe("DeepseekV3"), config)
    keys = [key for key, _ in model.named_parameters() if "modules_to_save" in key]
    assert [key.removeprefix("base_model.model.model.") for key in keys] == [
        "layers.0.mlp.down_proj.modules_to_save.default.weight",
        "layers.1.mlp.shared_experts.down_proj.modules_to_save.default.weight",
    ]


def test_all_inner_names_are_known():
    found = set()
    for preset, kind in [(p, RoutedAdapterConfig) for p in RoutedAdapterConfig.presets()] + [
        (p, LayerRoutingConfig) for p in ("dr_llm", "first", "informed", "flexi", "static")
    ]:
        more = {"target_modules": TARGETS} if kind is RoutedAdapterConfig else {}
        if "mhr" in preset or preset == "poly":
            more |= {"num_tasks": 1} if preset != "mhr_mu" else {}
            more |= {"bank_options": {"heads": 2}} if preset != "poly" else {}
        if preset == "mola":
            more["expert_layout"] = [2, 4]
        if preset == "expert_choice":
            more["causal_leak"] = "allow"
        if kind is RoutedAdapterConfig:
            more |= {"router_freeze_after": 1} | ({"dropout": 0.1} if preset != "mhr_mu" else {})
        model = get_peft_model(tiny_llama(4), kind.from_preset(preset, **more), adapter_name="mine")
        for path, _ in model.named_modules():
            head, ours, tail = path.partition(".mine.")
            if ours and ".moe_" in head:
                found.update(tail.split("."))
    assert {name for name in found if not name.isdigit()} <= INNER
