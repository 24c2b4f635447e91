"""`moe-kit train tiny` as a user runs it on a fresh machine: every step of the demo, in seconds."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel

from moe_kit.training.models import load_model_and_tokenizer
from moe_kit.training.recipe import load_recipe
from moe_kit.training.results import read_results

ROOT = Path(__file__).parents[2]

# under 30 s on two free cores (11 s on one when this was written); generous, since a busy machine stretches it
PROCESSOR_SECONDS = 60


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folder, printed text, and processor seconds of the whole command."""
    folder = tmp_path_factory.mktemp("tiny") / "out"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        # nothing may come from the network
        "HF_HUB_OFFLINE": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "moe_kit.cli", "train", "tiny", "--output_dir", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_it_takes_seconds(finished):
    _, _, seconds = finished
    assert 0 < seconds < PROCESSOR_SECONDS


def test_it_leaves_everything_that_the_demo_leaves(finished):
    folder, text, _ = finished
    recipe = load_recipe("tiny")
    left = {path.name for path in folder.iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml", "results.json"}
    assert files | {"checkpoints", "tokenizer_config.json"} <= left
    assert f"checkpoint-{recipe.train.max_steps}" in {path.name for path in (folder / "checkpoints").iterdir()}
    assert "import moe_kit" in (folder / "README.md").read_text()
    results = read_results(folder / "results.json")
    tasks = {task.name for task in recipe.data.tasks}
    assert set(results.ours) == set(results.zero_shot) == set(results.constants) == tasks
    assert results.details["steps"] == recipe.train.max_steps
    assert results.details["final_loss"] > 0
    for word in ("1/4", "2/4", "3/4", "4/4", "best constant", "mean", "tokens/s", "Next:", "moe-kit generate"):
        assert word in text
    assert text.count("    -> ") == recipe.eval.show


def test_the_adapter_loads_as_any_other(finished):
    folder, _, _ = finished
    base, _ = load_model_and_tokenizer("tiny")
    model = PeftModel.from_pretrained(base, str(folder))
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert model.peft_config["default"].preset == saved["preset"] == load_recipe("tiny").adapter.preset
