"""Tools that load an adapter folder by themselves, in a process where nobody wrote `import moe_kit`.

PEFT looks a method up in a table and has no entry point that would fill it, so plain tools stop with a KeyError; the
first test says so until PEFT changes. `moe-kit run -m MODULE` runs the same tool with the methods known.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from moe_kit import LayerRoutingConfig
from moe_kit.cli import main
from tests.conformance.common import config
from tests.tiny import batch_of, tiny_llama

# a tool that has never heard of moe_kit: each way of loading, and what comes out
TOOL = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

base, *folders = sys.argv[1:]
ids = torch.tensor(%s)
doors = {
    "auto_peft": lambda folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "auto_model": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "peft": lambda folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
}
found = {}
for folder in folders:
    for name, load in doors.items():
        try:
            with torch.no_grad():
                found[f"{folder} {name}"] = float(load(folder).eval()(input_ids=ids).logits.double().sum())
        except KeyError as error:
            found[f"{folder} {name}"] = str(error)
print(json.dumps({"found": found, "argv": sys.argv[1:], "name": __name__}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and two adapters on it with what each gives, and the tool beside them."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama(layers=4).save_pretrained(folder / "base")
    ids = batch_of()["input_ids"]
    layers = LayerRoutingConfig.from_preset("flexi", task_type="CAUSAL_LM")
    expected = {}
    for name, method in {"experts": config(), "layers": layers}.items():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(base, method).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "moe_" in key:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
            expected[name] = float(model(input_ids=ids).logits.double().sum())
            with model.disable_adapter():
                assert abs(float(model(input_ids=ids).logits.double().sum()) - expected[name]) > 1e-2
        model.save_pretrained(folder / name)
    (folder / "some_tool.py").write_text(TOOL % ids.tolist())
    return folder, expected


def run(folder, *words):
    root = Path(__file__).parent.parent.parent
    paths = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_plain_tool_meets_a_key_error(saved):
    """The canary: should PEFT open a door for outside methods, this fails, and the door is the better way."""
    folder, _ = saved
    found = run(folder, "some_tool.py", "base", "experts", "layers")["found"]
    assert found == {
        f"{name} {door}": repr(kind)
        for name, kind in (("experts", "MOE_ADAPTER"), ("layers", "MOE_DEPTH"))
        for door in ("auto_peft", "auto_model", "peft")
    }


def test_the_same_tool_under_moe_kit_run(saved):
    folder, expected = saved
    told = run(folder, "-m", "moe_kit", "run", "-m", "some_tool", "base", "experts", "layers")
    # the tool sees its own words and runs as the main program
    assert told["argv"] == ["base", "experts", "layers"]
    assert told["name"] == "__main__"
    assert told["found"] == {
        f"{name} {door}": pytest.approx(expected[name], abs=1e-3)
        for name in ("experts", "layers")
        for door in ("auto_peft", "auto_model", "peft")
    }


def test_cards_of_saved_adapters_say_what_the_key_error_means(saved):
    folder, _ = saved
    for name, kind in (("experts", "MOE_ADAPTER"), ("layers", "MOE_DEPTH")):
        card = (folder / name / "README.md").read_text()
        assert f"KeyError: '{kind}'" in card
        assert "moe-kit run -m" in card


def test_help_teaches(capsys):
    for words in (["run", "--help"], ["run", "-h"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        for word in ("-m MODULE", "KeyError: 'MOE_ADAPTER'", "lm_eval", "import moe_kit", "accelerate launch"):
            assert word in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "got 'nothing', expected `-m MODULE`"),
        (["lm_eval"], "got 'lm_eval', expected `-m MODULE`"),
        (["-m"], "got '-m', expected `-m MODULE`"),
        (["-m", "no_such_tool_17"], "no module 'no_such_tool_17'"),
        (["-m", "no_such_tool_17.part"], "no module 'no_such_tool_17.part'"),
        # a package without a __main__
        (["-m", "peft"], "no module 'peft'"),
    ],
)
def test_what_cannot_be_run_is_named(words, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["run", *words]) == 2
    assert message in capsys.readouterr().err


def test_status_and_errors_are_the_module_s_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["moe-kit"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaves_17.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    (tmp_path / "fails_17.py").write_text("import a_package_that_is_missing_17")
    with pytest.raises(SystemExit) as stop:
        main(["run", "-m", "leaves_17", "3"])
    assert stop.value.code == 3
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing_17"):
        main(["run", "-m", "fails_17"])
