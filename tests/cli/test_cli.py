"""The command line as a user types it."""

import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe_kit.cli import COMMANDS, main
from moe_kit.training.recipe import load_recipe, recipe_to_yaml

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
        (["kernels", "native", "--fast"], "got '--fast' after 'native'"),
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


def test_kernels_native_says_what_the_cpu_runs(monkeypatch, capsys):
    from moe_kit_kernels.common.native import Native

    monkeypatch.setattr(Native, "library", object())
    assert main(["kernels", "native"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["route_plan", "grouped_mm", "lora_experts"]
    assert all("runs compiled code on this CPU" in line for line in lines)
    monkeypatch.setattr(Native, "library", None)
    monkeypatch.setattr(Native, "why_not", "no C++ compiler was found")
    assert main(["kernels", "native"]) == 1
    assert capsys.readouterr().out.count("plain PyTorch on this CPU: no C++ compiler was found") == 3


def test_a_misspelt_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "tiny", "--train.max_stepz", "3"])
    assert stop.value.code == 2
    assert "--train.max-steps" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Files and folders that are not what a command wants."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "malformed.yaml").write_text("model: {name: tiny\ndata: [")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "empty.yaml").write_text("")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "folder").mkdir()
    broken = folder / "broken"
    broken.mkdir()
    (broken / "recipe.yaml").write_text(recipe_to_yaml(load_recipe("tiny")))
    (broken / "adapter_config.json").write_text("not json")
    closed = folder / "closed"
    closed.mkdir()
    (closed / "recipe.yaml").mkdir()
    return folder


@pytest.mark.parametrize("command", ["train", "inspect", "search-layers"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("malformed.yaml", "is not valid YAML"),
        ("binary.yaml", "is not valid YAML"),
        ("empty.yaml", "got an empty file, expected a mapping"),
        ("list.yaml", "got list, expected a mapping"),
        ("folder", "a folder without recipe.yaml"),
        ("closed", "a folder without recipe.yaml"),
        ("missing.yaml", "no such file"),
    ],
)
def test_wrong_configs_give_status_2_and_one_line(wrong, command, name, message, capsys):
    assert main([command, str(wrong / name)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["presets", "--x"], "expected no options"),
        (["--x"], "no command '--x'"),
        (["evl"], "did you mean 'eval'"),
        (["eval", "BROKEN"], "cannot be loaded on tiny"),
        (["inspect", "BROKEN"], "cannot be loaded on tiny"),
        (["generate", "BROKEN", "--prompt", "a"], "cannot be loaded on tiny"),
        (["eval", "FOLDER"], "a folder without recipe.yaml"),
        (["search-layers"], "needs a recipe"),
        (["search-layers", "tiny"], "is no recipe for a layer router"),
        (["search-layers", "depth/dr_llm", "--search.questions"], "expected pairs"),
        (["search-layers", "depth/dr_llm", "--search.questions", "["], "'[' is not a YAML value"),
        (["inspect", "depth/first"], "is a recipe for a layer router"),
        (["train", "depth/frist"], "Did you mean 'depth/first'"),
        (["train", "depth/first", "--phases.7.kind", "lora"], "'7' is no place in a list of 2"),
        (["train", "depth/first", "--preset.x", "1"], "'x' lies inside 'first'"),
        (["train", "depth/first", "--sed", "1"], "did you mean 'seed'"),
        (["train", "depth/first", "--base_adapter", "FOLDER", "--model.name", "tiny"], "adapter_config.json"),
    ],
)
def test_wrong_words_give_status_2_and_one_line(wrong, words, message, capsys):
    places = {"BROKEN": str(wrong / "broken"), "FOLDER": str(wrong / "folder")}
    assert main([places.get(word, word) for word in words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1, captured.err


class TestLayerRouters:
    def test_help_lists_and_explains_them(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["train", "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert all(name in out for name in ("tiny", "quickstart_remix", "depth/first", "depth/dr_llm"))
        assert main(["train", "depth/first", "--help"]) == 0
        out = capsys.readouterr().out
        assert "--phases.0.settings.steps 100" in out
        assert "base_adapter: outputs/quickstart_lora" in out

    def test_train_runs_what_the_recipe_says(self, monkeypatch, capsys):
        from moe_kit.training import depth

        seen, resumed = [], []

        def train(recipe, *, resume, on_step):
            seen.append(recipe)
            resumed.append(resume)
            return {"held_out": {}}

        monkeypatch.setattr(depth, "train_layers", train)
        words = ["--phases.0.settings.steps", "3", "--output-dir=elsewhere"]
        assert main(["train", "depth/first", *words]) == 0
        assert main(["train", "depth/first", "--resume", *words]) == 0
        assert resumed == [False, True]
        assert seen == [depth.load_depth_recipe("depth/first", words)] * 2
        assert (seen[0].phases[0].settings["steps"], seen[0].output_dir) == (3, "elsewhere")

    def test_a_whole_run(self, tmp_path, capsys):
        words = ["--model.name", "tiny", "--data.eval_examples", "2", "--search.questions", "2"]
        words += ["--base_adapter", "null", "--output_dir", str(tmp_path / "out")]
        assert main(["train", "depth/random", *words]) == 0
        assert (tmp_path / "out" / "adapters.json").is_file()
        assert "nats_per_token" in capsys.readouterr().out


class TestInterruption:
    """Ctrl-C while training."""

    def words(self, folder):
        return [
            "train",
            "tiny",
            "--output_dir",
            str(folder),
            *FAST,
            "--train.max_steps",
            "4",
            "--train.save_steps",
            "3",
        ]

    def interrupted(self, monkeypatch, folder, at, times=1):
        """Press the keys while the forward pass of a step runs."""
        from transformers import TrainerCallback

        from moe_kit.training import fitting

        class Press(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == at:
                    for _ in range(times):
                        signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(fitting, "stepping", lambda reporter, tokens: Press())
            return main(self.words(folder))

    def test_the_step_is_finished_saved_and_resumed(self, tmp_path, monkeypatch, capsys):
        assert main(self.words(tmp_path / "whole")) == 0
        folder = tmp_path / "broken"
        assert self.interrupted(monkeypatch, folder, at=1) == 130
        err = capsys.readouterr().err
        assert "stopping after this step" in err
        assert f"checkpoint-2: `moe-kit train {folder} --resume` goes on from there" in err
        assert "Traceback" not in err
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert not (folder / "adapter_model.safetensors").exists()
        assert main(["train", str(folder), "--resume"]) == 0
        assert "resuming after step 2" in capsys.readouterr().out
        one, two = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "whole", folder))
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_twice_stops_at_once(self, tmp_path, monkeypatch, capsys):
        folder = tmp_path / "out"
        assert self.interrupted(monkeypatch, folder, at=1, times=2) == 130
        assert f"There is no checkpoint yet: `moe-kit train {folder}` starts over" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_another_handler_is_left_alone(self):
        from moe_kit.training.interrupt import interruptible

        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with interruptible() as stopping:
                assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert not stopping.asked
        finally:
            signal.signal(signal.SIGINT, previous)
