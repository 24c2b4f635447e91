"""Options that the pages about routers show between backticks are options: each wraps a tiny model, which then runs."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from moe_kit import RoutedAdapterConfig, routing_inputs
from tests.tiny import tiny_llama

DOCS = Path(__file__).parent.parent.parent / "docs"
PRESETS = {
    "token_choice": "mixture_of_lora",
    "expert_choice": "expert_choice",
    "policy": "remix",
    "rank_wise": "flylora",
    "task_routing": "mhr",
}
FIELDS = {field.name for field in fields(RoutedAdapterConfig)}


def shown():
    """(page, field values) of every `field=value, ...` and `from_preset(...)` between backticks."""
    found = []
    for page, preset in PRESETS.items():
        text = re.sub(r"^```.*?^```", "", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", text):
            call = code if code.startswith("from_preset(") else f"from_preset({preset!r}, {code})"
            try:
                (statement,) = ast.parse(" ".join(call.split())).body
                assert isinstance(statement, ast.Expr)
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in statement.value.keywords}
                name = ast.literal_eval(statement.value.args[0])
            except (SyntaxError, ValueError):
                continue
            # experts of a base need another base; fields that do not exist are names of something else
            if given and FIELDS.issuperset(given) and "target_parameters" not in given:
                found.append(pytest.param(name, given, id=f"{page}: {code}"))
    return found


@pytest.mark.parametrize(("preset", "given"), shown())
def test_options_of_the_pages(preset, given):
    values = {"num_experts": 8, "top_k": 2, "r": 2, "target_modules": "all-linear", "num_tasks": 2}
    values |= {"bank_options": {"heads": 2}} if preset == "mhr" else {}
    values |= {"causal_leak": "allow"} if preset == "expert_choice" else {}
    model = get_peft_model(tiny_llama(), RoutedAdapterConfig.from_preset(preset, **{**values, **given})).eval()
    with routing_inputs(model, task_ids=[0, 1], mask_ratio=0.5):
        logits = model(input_ids=torch.ones(2, 4, dtype=torch.long)).logits
    assert logits.isfinite().all()


def test_every_page_shows_options():
    assert {param.id.partition(":")[0] for param in shown()} == set(PRESETS)
