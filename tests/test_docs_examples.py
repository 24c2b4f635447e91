"""Every Python example and every command of the documentation does what it says, on tiny models."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from moe_kit_kernels import route_plan

from moe_kit.cli import main as cli
from moe_kit.training.recipe_files import find_config
from tests.tiny import tiny_llama

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("kernels/moe_kit_kernels/*/README.md"))]


def blocks(language):
    """(page:line, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 2
            found.append(pytest.param(match.group(1), id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def given():
    """What the examples take as given: a model with batches, and the operators' operands."""
    T, K, E, D, O, L = 6, 2, 8, 16, 16, 4
    generator = torch.Generator().manual_seed(0)

    def rand(*size):
        return torch.rand(*size, generator=generator)

    ids = torch.rand(T, E, generator=generator).topk(K).indices
    plan = route_plan(ids, E)
    batch = dict(input_ids=torch.randint(2, 61, (3, 9), generator=generator), max_new_tokens=2)
    model = tiny_llama(layers=4).eval()
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    A, B, W = [rand(E, L, D) for _ in "qkv"], [rand(E, O, L) for _ in "qkv"], [rand(O, D) for _ in "qkv"]
    return dict(
        model=model,
        batch=batch,
        batches=[dict(input_ids=batch["input_ids"], labels=batch["input_ids"])],
        plan=plan,
        num_experts=E,
        num_tokens=T,
        x_TD=rand(T, D),
        A_ELD=A[0],
        B_EOL=B[0],
        **{f"A{name}": value for name, value in zip(("q", "k", "v", "_q", "_k", "_v"), (*A, *A))},
        **{f"B{name}": value for name, value in zip(("q", "k", "v", "_q", "_k", "_v"), (*B, *B))},
        **{f"W{name}": value for name, value in zip("qkv", W)},
        weight_OD=W[0],
        bias_O=rand(O),
        bias=rand(16),
        base_TO=rand(T, O),
        ids_TK=ids,
        expert_ids_TK=ids,
        weights_TK=rand(T, K),
        weights_TE=rand(T, E),
        weights_P=rand(T * K),
        token_P=plan.token_P,
        expert_P=plan.expert_P,
        logits_TE=rand(T, 16),
    )


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code):
    names = given()
    # a forward pass takes no generation argument
    if "generate" not in code:
        names["batch"].pop("max_new_tokens")
    exec(compile(code, "example", "exec"), names)


def commands():
    """Every `moe-kit ...` in a shell block or between backticks, without placeholders."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for command in re.findall(r"^(moe-kit [^#\n]*)|`(moe-kit [^`]*)`", text, re.MULTILINE):
            words = shlex.split(" ".join(command))
            if not any(word.isupper() or "[" in word or word == "..." for word in words[2:]):
                found.setdefault(" ".join(words), words[1:])
    return [pytest.param(words, id=name) for name, words in found.items()]


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words, capsys):
    name, *rest = words
    # help leaves by a status where argparse prints it
    with contextlib.suppress(SystemExit):
        assert not cli([*words[: 2 if name == "kernels" else 1], "--help"])
    text = capsys.readouterr().out
    assert "usage" in text or f"moe-kit {name}" in text
    for option in (word for word in rest if re.fullmatch(r"--[a-z-]+", word) and word != "--help"):
        assert option in text, f"{name} --help does not know {option}"
    if name in ("train", "search-layers") and rest and not rest[0].startswith(("outputs/", "-")):
        find_config(rest[0])
