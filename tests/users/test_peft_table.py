"""The page "Routed adapters beside PEFT's LoRA" is these tables, and each line of them is tried here.

`python -m tests.users.test_peft_table` prints the tables for the page.
"""

import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from moe_kit import ConfigError, RoutedAdapterConfig
from moe_kit.adapters.layer import RoutedLayer
from moe_kit.adapters.refused import REFUSED_OPTIONS
from tests.conformance.common import NAME, config, routed
from tests.tiny import batch_of, tiny_llama

PAGE = Path(__file__).parent.parent.parent / "docs" / "peft_lora.md"
# what PEFT's own options of every method mean
SHARED = {
    "peft_type": "the method's name, `MOE_ADAPTER`",
    "auto_mapping": "PEFT's own note of the base's class",
    "peft_version": "PEFT's own note of its version",
    "base_model_name_or_path": "the base",
    "revision": "of the base",
    "task_type": "PEFT's wrapper class",
    "inference_mode": "loaded frozen",
}


def options():
    """(option of LoraConfig, whether we have it, what it does here or why it is refused)."""
    ours = {field.name: field.metadata.get("help", "") for field in fields(RoutedAdapterConfig)}
    rows = []
    for name in sorted(field.name for field in fields(LoraConfig)):
        note = SHARED.get(name) or ours.get(name) or REFUSED_OPTIONS[name]
        rows.append((name, name in ours, note.split(". ")[0].rstrip(".").replace("|", "\\|")))
    return rows


def model():
    """Two adapters, the first active."""
    wrapped = routed()
    wrapped.add_adapter("second", config(r=2))
    return wrapped.eval()


def layer(wrapped):
    return next(module for module in wrapped.modules() if isinstance(module, RoutedLayer))


def saved(wrapped):
    folder = tempfile.mkdtemp()
    wrapped.save_pretrained(folder)
    return folder


def same_routers(wrapped):
    """Give the second adapter the routers of the first, so that the two have a sum."""
    for module in wrapped.modules():
        if isinstance(module, RoutedLayer) and len(module.moe_adapter_router) == 2:
            routers = module.moe_adapter_router
            routers["second"].load_state_dict(routers[NAME].state_dict())
    return wrapped


def rows_call(wrapped):
    return wrapped(**batch_of(), adapter_names=[NAME, "__base__"])


def injected(wrapped):
    state = get_peft_model_state_dict(wrapped, adapter_name=NAME)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    return inject_adapter_in_model(config(), tiny_llama(), state_dict=state)


# name -> (note, what tries it); a note of what is refused names the error that says so
WORKS = {
    "get_peft_model, add_adapter": (
        "several adapters of any sizes and targets",
        lambda m: m.add_adapter("x", config()),
    ),
    "from_pretrained, load_adapter": (
        "`low_cpu_mem_usage` too",
        lambda m: PeftModel.from_pretrained(tiny_llama(), f"{saved(m)}/{NAME}", low_cpu_mem_usage=True),
    ),
    "save_pretrained": ("safetensors", saved),
    "generate": ("caches, beams, returned sequences", lambda m: m.generate(batch_of()["input_ids"], max_new_tokens=1)),
    "adapter_names": ("one adapter a row, in `forward` and `generate`", rows_call),
    "set_adapter": ("one, or several of a native model, which add up", lambda m: m.set_adapter("second")),
    "active_adapters": ("", lambda m: m.active_adapters),
    "delete_adapter": (
        "its routers go with it, hooks with the last one of a `PeftModel`",
        lambda m: m.delete_adapter("second"),
    ),
    "disable_adapter, disable_adapter_layers, enable_adapter_layers": ("", lambda m: m.disable_adapter().__enter__()),
    "set_requires_grad": ("frozen parts of an adapter stay so", lambda m: m.set_requires_grad("second")),
    "unload": ("hooks go as well", lambda m: m.unload()),
    "unmerge_adapter": ("of LoRAs on the base's experts; else nothing to do", lambda m: m.unmerge_adapter()),
    "add_weighted_adapter": (
        "`cat` and `linear` under equal routers; see below",
        lambda m: same_routers(m).add_weighted_adapter([NAME, "second"], [1.0, 0.5], "both"),
    ),
    "inject_adapter_in_model": ("with a state dict too", injected),
    "inject_adapter": ("as PEFT calls it", lambda m: m.base_model.inject_adapter(m.base_model.model, NAME)),
    "get_layer_status, get_model_status": ("", get_layer_status),
    "get_model_config": ("", lambda m: m.base_model.get_model_config(m.base_model.model)),
    "supports_lora_conversion": ("False", lambda m: m.supports_lora_conversion()),
    "get_base_layer, get_base_weight": ("", lambda m: layer(m).get_base_weight()),
    "in_features, out_features": ("of an adapted linear", lambda m: (layer(m).in_features, layer(m).out_features)),
}
REFUSED = {
    "merge_adapter, merge_and_unload": (
        "the result depends on the input; `collapse_to_lora` where the routing is constant; LoRAs on the base's experts merge",
        lambda m: m.merge_and_unload(),
        "collapse_to_lora",
    ),
    "convert_to_lora": (
        "a mixture is no constant matrix; `collapse_to_lora` where it is",
        lambda m: convert_to_lora(m, rank=4),
        "do not support LoRA conversion",
    ),
    "subtract_mutated_init": (
        "and `path_initial_model_for_weight_conversion`: our experts' start changes no base weight, so there is nothing to undo",
        lambda m: m.save_pretrained(tempfile.mkdtemp(), path_initial_model_for_weight_conversion=tempfile.mkdtemp()),
        "not supported for RoutedAdapterModel",
    ),
    "hotswap_adapter": (
        "PEFT swaps LoRAs alone; `load_adapter` and `set_adapter` do the same here",
        lambda m: hotswap_adapter(m, f"{saved(m)}/second", NAME),
        "only supports LORA",
    ),
    "rescale_adapter_scale, set_scale, scale_layer, unscale_layer": (
        "set `lora_alpha` or `scale`; `add_weighted_adapter([name], [0.5], ...)` scales a trained adapter",
        lambda m: rescale_adapter_scale(m, 0.5).__enter__(),
        "only supported for models with `LoraLayer`s",
    ),
    "PeftMixedModel": (
        "PEFT's list of types is closed; native `add_adapter` mixes methods, and `save_adapters` keeps them",
        lambda m: get_peft_model(tiny_llama(), config(), mixed=True),
        "not compatible with the `PeftMixedModel`",
    ),
}
# of LoRA's layer: starts of A and B, and what LoRA variants are made of
STARTS = {name for name in dir(LoraLayer) if name.endswith("_init")} | {
    "lora_variants",
    "resolve_lora_variant",
    "reset_lora_parameters",
    "update_layer",
}


def words(table):
    return {word for names in table for word in names.split(", ")}


def rendered():
    """The two tables as they stand on the page."""
    lines = ["| option of `LoraConfig` | here | |", "|---|---|---|"]
    lines += [f"| `{name}` | {'yes' if have else 'no'} | {note} |" for name, have, note in options()]
    lines += ["", "| method or function | here | |", "|---|---|---|"]
    for table, answer in ((WORKS, "yes"), (REFUSED, "no")):
        for names, (note, *_) in table.items():
            lines.append(f"| {', '.join(f'`{name}`' for name in names.split(', '))} | {answer} | {note} |")
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_the_page_is_these_tables():
    text = PAGE.read_text(encoding="utf-8")
    options_table, methods_table = rendered().split("\n\n")
    assert options_table in text
    assert methods_table in text


def test_every_option_of_lora_is_answered():
    names = {field.name for field in fields(LoraConfig)}
    ours = {field.name for field in fields(RoutedAdapterConfig)}
    assert names == {name for name, _, _ in options()}
    assert not ours & set(REFUSED_OPTIONS), "an option that exists is refused"
    assert set(REFUSED_OPTIONS) <= names, "an option that LoRA no longer has"


def test_every_method_of_lora_is_answered():
    known = words(WORKS) | words(REFUSED)
    public = {name for name in dir(LoraModel) if not name.startswith("_") and callable(getattr(LoraModel, name, None))}
    assert public - set(dir(nn.Module)) - {"tuner_layer_cls"} <= known | {"unload"}
    layers = {name for name in set(dir(LoraLayer)) - set(dir(BaseTunerLayer)) if not name.startswith("_")}
    assert layers <= known | STARTS | set(dir(nn.Module))
    assert set(dir(BaseTuner)) <= set(dir(type(model().base_model)))


@pytest.mark.parametrize("name", [name for name, have, _ in options() if not have])
def test_refused_options(name):
    with pytest.raises(ConfigError, match=name):
        RoutedAdapterConfig(**{name: None})


@pytest.mark.parametrize("names", WORKS)
def test_methods_that_work(names):
    wrapped = model()
    WORKS[names][1](wrapped)
    with torch.no_grad():
        assert wrapped.get_base_model()(**batch_of()).logits.isfinite().all()


@pytest.mark.parametrize("names", REFUSED)
def test_methods_that_are_refused(names):
    wrapped = model()
    with torch.no_grad():
        expected = wrapped(**batch_of()).logits
    _, attempt, message = REFUSED[names]
    with pytest.raises((ValueError, TypeError), match=message):
        attempt(wrapped)
    with torch.no_grad():
        assert torch.equal(wrapped(**batch_of()).logits, expected)


if __name__ == "__main__":
    print(rendered())
