"""The command line as a user types it."""

import pytest
import yaml

from moe_kit.cli import COMMANDS, main
from moe_kit.training.recipe import load_recipe

FAST = ["--train.max_steps", "2", "--data.eval_examples", "2", "--eval.zero_shot", "False", "--train.warmup-steps", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "out"
    assert main(["train", "tiny", "--output_dir", str(folder), *FAST, "--adapter.settings.lora_alpha", "7"]) == 0
    return folder


def test_overrides_reach_the_recipe(trained):
    recipe = load_recipe(trained)
    assert (recipe.train.max_steps, recipe.data.eval_examples, recipe.eval.zero_shot) == (2, 2, False)
    # a key that tiny.yaml does not have, and one that it has
    assert recipe.adapter.settings["lora_alpha"] == 7
    assert recipe.adapter.settings["num_experts"] == 4
    assert yaml.safe_load((trained / "recipe.yaml").read_text())["train"]["warmup_steps"] == 0


def test_eval_generate_inspect(trained, capsys):
    assert main(["eval", str(trained), "--data.eval_examples", "4"]) == 0
    out = capsys.readouterr().out
    assert "exact match" in out
    assert "nats a token" in out
    assert main(["generate", str(trained), "--prompt", "2 + 2", "--max-new-tokens", "3"]) == 0
    assert main(["inspect", str(trained)]) == 0
    out = capsys.readouterr().out
    for word in ("14 adapted linears", "8 routers", "q_proj, k_proj, v_proj", "active for one token", "FLOPs"):
        assert word in out


def test_presets_have_a_line_and_a_source(capsys):
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    for name in ("mixture_of_lora", "remix", "arXiv 2404.15159"):
        assert name in out


def test_help_teaches(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for word in (*COMMANDS, "moe-kit train quickstart", "--resume"):
        assert word in out
    with pytest.raises(SystemExit) as stop:
        main(["train", "tiny", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("--train.max-steps", "Optimizer steps", "default: 12", "--resume", "--compare", "lora_alpha"):
        assert word in out


def test_kernel_check_passes_words_and_status_on(monkeypatch):
    from moe_kit_kernels import aot

    seen = []
    monkeypatch.setattr(aot, "main", lambda words: seen.append(words) or 1)
    assert main(["kernels", "check", "--arch", "sm_80"]) == 1
    assert seen == [["--arch", "sm_80"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "tiny"], "no command 'trian'; did you mean 'train'"),
        (["train"], "give a config"),
        (["train", "tinny"], "Did you mean 'tiny'"),
        (["train", "tiny", "--train.max_steps", "0"], "train.max_steps: got 0"),
        (["train", "tiny", "--adapter.settings.nonsense", "1", "--output_dir", "OUT"], "adapter.settings.nonsense"),
        (["train", "tiny", "--adapter.settings.r"], "expected 1 argument|needs a value"),
        (["train", "tiny", "--data.tasks.7.settings.max_terms", "3"], "the recipe has 2 tasks"),
        (["train", "tiny", "--model.name", "no/such", "--output_dir", "OUT"], "cannot load 'no/such'"),
        (["eval", "tiny"], "is not a folder"),
        (["generate", "nowhere", "--prompt", "a"], "has no recipe.yaml"),
        (["generate", "nowhere", "--prompt", " "], "the prompt is empty"),
        (["presets", "x"], "expected no options"),
        (["kernels", "chekc"], "expected 'check'"),
    ],
)
def test_mistakes_give_status_2_and_a_hint(words, message, tmp_path, capsys):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    captured = capsys.readouterr()
    text = " ".join((captured.err + captured.out).split())
    assert any(part in text for part in message.split("|")), text


def test_a_misspelt_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "tiny", "--train.max_stepz", "3"])
    assert stop.value.code == 2
    assert "--train.max-steps" in capsys.readouterr().err
