"""`moe-kit inspect` against numbers counted by hand: one linear of 16 to 16 in one layer, or k_proj, 16 to 8."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from moe_kit import RoutedAdapterConfig
from moe_kit.adapters.parts import SELECTIONS
from moe_kit.training.inspection import inspect_model, print_inspection
from tests.tiny import tiny_llama

D, O = 16, 16


def model_of(preset="mixture_of_lora", targets=("q_proj",), **fields):
    values = dict(num_experts=8, top_k=2, r=3, target_modules=list(targets))
    config = RoutedAdapterConfig.from_preset(preset, **{**values, **fields})
    return get_peft_model(tiny_llama(1), config)


def found_in(*args, **fields):
    return inspect_model(model_of(*args, **fields))


def only(found):
    (module,) = found.modules
    return module


def printed(found):
    console = Console(width=160, file=io.StringIO())
    print_inspection(found, console)
    return console.file.getvalue()


# selection -> fields, number and how to read it, for 8 experts and top_k 2
ACTIVE = [
    (dict(select="all", weight="softmax"), 8, "8"),
    (dict(select="top_k"), 2, "2"),
    (dict(select="sample_k", weight="remix", losses={}), 2, "2"),
    (dict(select="capacity"), 2, "up to 2"),
    (dict(select="capacity", select_options={"policy": "gshard"}, causal_leak="allow"), 2, "up to 2"),
    (dict(select="expert_choice", causal_leak="allow", losses={}), 2, "2 on average"),
    (
        dict(
            select="expert_choice",
            causal_leak="allow",
            losses={},
            select_options={"schedule": "linear", "k_min": 1, "k_max": 4},
        ),
        4,
        "up to 4 on average",
    ),
    (dict(select="expert_choice", losses={}, select_options={"threshold": "ema"}), 8, "up to 8, aims at 2"),
    (dict(select="top_p", losses={}), 8, "up to 8"),
    (dict(select="positive", weight="relu", losses={}), 8, "up to 8"),
    (dict(select="learned_threshold", weight="excess", losses={}), 8, "up to 8"),
    # every expert is computed, whatever is chosen
    (dict(select="top_k", weight="dense_mixer"), 8, "8"),
]


@pytest.mark.parametrize(("fields", "number", "text"), ACTIVE, ids=[f"{f['select']}-{t}" for f, _, t in ACTIVE])
def test_active_experts(fields, number, text):
    found = found_in(**fields)
    module = only(found)
    assert module.active == number
    assert module.active_form.format(module.active) == text
    assert module.parameters == 8 * 3 * (D + O)
    assert module.active_parameters == number * 3 * (D + O)
    out = printed(found)
    assert f" {text} " in out
    total = f"{number * 3 * (D + O) + module.router_active:,}"
    # what is no exact number is not printed as one
    expected = text.partition(",")[0].replace(str(number), total)
    (line,) = [line for line in out.splitlines() if line.startswith("active for one token")]
    assert line.split("token")[1].split("of the")[0].strip() == expected
    flops = f"{2 * (number * 3 * (D + O) + module.router_active):,}"
    assert f"adapter {text.partition(',')[0].replace(str(number), flops)} = " in out


def test_every_selection_is_covered():
    assert {fields["select"] for fields, _, _ in ACTIVE} == set(SELECTIONS)


def test_remoe_aims_at_its_controller_s_number():
    module = only(found_in("remoe"))
    assert (module.active, module.active_form) == (8, "up to {}, aims at 2")


def test_layers_of_different_experts_keep_their_own():
    config = RoutedAdapterConfig.from_preset("mola", top_k=2, r=3, expert_layout=[2, 6], target_modules=["q_proj"])
    found = inspect_model(get_peft_model(tiny_llama(2), config))
    assert [(m.experts, m.active, m.active_parameters) for m in found.modules] == [(2, 2, 192), (6, 2, 192)]
    assert "2-6" in printed(found)


@pytest.mark.parametrize("select", ["top_k", "all"])
def test_a_shared_a_is_met_once_whatever_is_chosen(select):
    weight = "softmax" if select == "all" else "selected_softmax"
    module = only(found_in("hydralora", select=select, weight=weight, targets=["k_proj"]))
    chosen = 8 if select == "all" else 2
    assert module.parameters == 3 * D + 8 * 3 * 8
    assert module.shared_parameters == 3 * D
    assert module.active_parameters == 3 * D + chosen * 3 * 8


def test_a_shared_a_of_as_many_rows_as_experts():
    """Rank 8 and 8 experts: the first size alone does not tell what is stacked."""
    module = only(found_in("hydralora", r=8, select="top_k", weight="selected_softmax"))
    assert module.active_parameters == 8 * D + 2 * 8 * O


def test_flylora_s_dense_projection_is_work():
    found = found_in("flylora", num_experts=32, top_k=8)
    module = only(found)
    assert (module.parameters, module.router_parameters) == (32 * O, 0)
    assert module.active_parameters == 8 * O
    assert module.router_active == 32 * D
    assert found.active_parameters == 8 * O + 32 * D
    assert found.extra_flops == 2 * (8 * O + 32 * D)
    assert found.trainable_parameters == 32 * O


def test_frozen_experts_are_counted(tmp_path):
    for name, rank in (("one", 2), ("two", 3)):
        lora = get_peft_model(tiny_llama(1), LoraConfig(r=rank, target_modules=["q_proj"]))
        lora.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("one", "two")]
    found = found_in(from_adapters=folders, top_k=1)
    module = only(found)
    # ranks are padded to the greater one
    assert module.parameters == 2 * 3 * (D + O)
    assert module.active_parameters == 1 * 3 * (D + O)
    assert found.trainable_parameters == module.router_parameters == 2 * D
    assert found.base_parameters == sum(p.numel() for p in tiny_llama(1).parameters())


ROUTERS = [
    (dict(score_options={"bias": True}), 8 * D + 8, 8 * D + 8),
    # the matrix of the noise acts in training only
    (dict(score="noisy_linear"), 2 * 8 * D, 8 * D),
    (dict(score="mlp", score_options={"hidden": 5}), 5 * D + 5 + 8 * 5 + 8, 5 * D + 5 + 8 * 5 + 8),
    (dict(score="prototype", score_options={"trainable": False}), 0, 8 * D),
    (dict(preset="loss_free"), 8 * D, 8 * D),
    (dict(preset="adamole"), 8 * D + D + 1, 8 * D + D + 1),
    (dict(select="expert_choice", losses={}, select_options={"threshold": "ema"}), 8 * D, 8 * D),
    # one row of the table for a task
    (dict(preset="poly", num_tasks=5), 5 * 8, 8),
]


@pytest.mark.parametrize(("fields", "stored", "met"), ROUTERS)
def test_router_work(fields, stored, met):
    module = only(found_in(**fields))
    assert (module.router_parameters, module.router_active) == (stored, met)


def test_a_shared_router_is_counted_once():
    found = found_in(targets=["q_proj", "k_proj", "v_proj"])
    assert [m.router_active for m in found.modules] == [8 * D, 0, 0]
    assert found.active_parameters == 8 * D + 2 * 3 * ((D + 16) + 2 * (D + 8))


def test_modules_that_are_trained_in_full_count_once():
    plain = tiny_llama(1)
    found = inspect_model(model_of(modules_to_save=["lm_head"]))
    assert found.base_parameters == sum(p.numel() for p in plain.parameters())
    assert found.base_flops == found_in().base_flops
    assert found.trainable_parameters == found_in().trainable_parameters + 61 * D


def test_names_in_brackets_are_printed_as_they_are():
    inner = torch.nn.ModuleDict({"[/INST]": torch.nn.Linear(4, 4)})
    model = tiny_llama(1)
    model.model.layers[0].extra = inner
    found = inspect_model(
        get_peft_model(model, RoutedAdapterConfig.from_preset("mixture_of_lora", target_modules=r".*INST\]"))
    )
    assert "extra.[/INST]" in printed(found)
