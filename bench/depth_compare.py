"""Quality against compute of layer routers on tasks that the base model was fine-tuned on.

    python -m bench.depth compare --folder DIR [--seeds 0 1] [--steps 40] [--methods dense first ...]
    python -m bench.depth plot --folder DIR

The base is fine-tuned once (a LoRA adapter in DIR/base that every method merges); every phase of every method then has
the same number of steps on the same data. One JSON row a point in DIR/rows.jsonl, written as soon as it is known: what
has a row is not run again, and a method that was trained is not trained again. What all points have in common (steps,
model, ...) is in DIR/settings.json; a folder takes no points of other settings.

A row: `saved` = the share of all layers that the compute knob was calibrated to save on training examples (null: as
trained), `budget` = where the knob stands, `layers` = mean layer applications over prompts, `nats_per_token` and `exact` (all tokens of the answer are the
most likely ones, which is what greedy decoding would answer) over held-out examples in the mean over tasks, and for
single prompts tokens/s of prefill and decode beside those of the same model with its layer routers off. LoRA is merged.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

METHODS = ("dense", "dense_lora", "static", "importance", "random", "dr_llm", "first", "informed", "flexi")
# shares of all layers that are saved, each a point of what was trained once; None = as it was trained
SAVED: dict[str, tuple[float | None, ...]] = {
    "dense": (None,),
    "dense_lora": (None,),
    "static": (0.1, 0.2),
    "importance": (0.1, 0.2),
    "random": (0.1, 0.2),
    "dr_llm": (None, 0.1, 0.2),
    "first": (None, 0.1, 0.2),
    "informed": (None, 0.1, 0.2),
    "flexi": (None, 0.1, 0.2),
}
# batches of training examples that a budget is calibrated on
CALIBRATED = 4
# what the points of one folder have in common
SHARED = ("steps", "base_steps", "questions", "simulations", "model")
DECODED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings of a comparison."""

    folder: Path
    """Where the base, the adapters, the labels and the rows are."""

    methods: Sequence[str] = METHODS
    """What is compared."""

    seeds: Sequence[int] = (0,)
    """One training a method and seed."""

    steps: int = 40
    """Optimizer steps of every phase."""

    base_steps: int = 150
    """Optimizer steps of the base's own fine-tuning."""

    questions: int = 48
    """Held-out examples, and training questions that are searched."""

    simulations: int = 20
    """Simulations of each search tree."""

    model: str = "smollm2-135m-instruct"
    """The base model; `tiny` for a trial."""


def recipe_of(method: str, seed: int, settings: Comparison) -> Any:
    """Recipe of a method on the fine-tuned base.

    Args:
        method: one of `METHODS`.
        seed: seed of its routers and of the order of its data.
        settings: the comparison.

    Returns:
        The checked recipe.
    """
    from moe_kit.training.depth import load_depth_recipe

    folder, steps = settings.folder, settings.steps
    name = {"dense": "random", "dense_lora": "first", "importance": "static"}.get(method, method)
    recipe = yaml.safe_load((Path(__file__).parent.parent / "configs" / "depth" / f"{name}.yaml").read_text())
    recipe.update(base_adapter=str(folder / "base"), output_dir=str(folder / f"{method}-{seed}"), seed=seed)
    recipe["model"]["name"] = settings.model
    recipe["data"].update(eval_examples=settings.questions)
    if method == "dense":
        recipe["settings"] = {"budget": 0.0}
    if method == "dense_lora":
        # the LoRA of FiRST's second phase, without any router before it
        recipe["phases"] = recipe["phases"][1:]
    if method in ("static", "importance"):
        # what is skipped is found at each point
        recipe["phases"] = []
    for phase in recipe.get("phases", []):
        phase["batch_size"] = 8
        if phase["kind"] != "calibrate":
            phase["settings"] = {**phase["settings"], "steps": steps, "warmup_steps": steps // 10}
    recipe["search"] = {
        "output": str(folder / "labels.jsonl"),
        "questions": settings.questions,
        "scorer": "likelihood",
        # right: no worse a token than one half, which the fine-tuned base reaches on most questions
        "settings": {
            "simulations": settings.simulations,
            "correct": 0.5 if settings.model != "tiny" else 1e-6,
            "tolerance": 0.05,
        },
    }
    return load_depth_recipe(recipe)


def fine_tuned_base(settings: Comparison) -> None:
    """Fine-tune the base model on the tasks once, as a LoRA adapter that every method merges first."""
    folder = settings.folder
    if (folder / "base" / "adapter_config.json").exists():
        return
    from peft import LoraConfig, get_peft_model

    from moe_kit.depth.fit import FitConfig, fit_others
    from moe_kit.training.data import load_examples
    from moe_kit.training.depth import example_batches
    from moe_kit.training.models import load_model_and_tokenizer

    recipe = recipe_of("random", 0, settings)
    model, tokenizer = load_model_and_tokenizer(recipe.model.name)
    sets = load_examples(recipe.data, train_examples=settings.base_steps * 8)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    fit = FitConfig(steps=settings.base_steps, learning_rate=1e-3, warmup_steps=settings.base_steps // 10)
    batches = example_batches(list(sets.train), tokenizer, recipe, 8)
    fit_others(wrapped, batches, fit, adapters=["default"], on_step=_show("base"))
    # the folder's config is what says that it is whole, and PEFT writes it last
    wrapped.save_pretrained(str(folder / "base"))


def _show(what: str) -> Callable[[int, float], None]:
    return lambda step, loss: None if step % 10 else print(f"{what} {step}: {loss:.4f}", flush=True)


def compare(settings: Comparison) -> None:
    """Train and evaluate every method, seed and budget that has no row yet.

    Args:
        settings: the comparison.

    Raises:
        CheckpointError: if the folder holds a comparison of other settings.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    rows_file = settings.folder / "rows.jsonl"
    rows = read_rows(rows_file)
    _agree(settings, rows)
    known = {(row["method"], row["seed"], row["saved"]) for row in rows}
    fine_tuned_base(settings)
    for seed in settings.seeds:
        for method in settings.methods:
            wanted = [saved for saved in SAVED[method] if (method, seed, saved) not in known]
            if not wanted:
                continue
            for row in _points(method, seed, wanted, settings):
                with rows_file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def _agree(settings: Comparison, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse a folder whose points could not be compared with new ones; note the settings of a fresh one."""
    from moe_kit.errors import CheckpointError

    path = settings.folder / "settings.json"
    asked: dict[str, Any] = {name: getattr(settings, name) for name in SHARED}
    # how LoRA ran while speeds were taken; rows that do not say so are from before it was merged
    asked["lora"] = "merged"
    # rows of a folder without the file tell their steps
    before = {"steps": rows[0]["steps"]} if rows else {}
    if path.exists():
        before = json.loads(path.read_text())
    if rows:
        before.setdefault("lora", "beside the base")
    other = {name: value for name, value in before.items() if value != asked[name]}
    if other:
        raise CheckpointError(
            f"{settings.folder} holds a comparison with {other}, now asked for { ({name: asked[name] for name in other}) }: "
            "use another folder, or the same settings."
        )
    path.write_text(json.dumps(asked, indent=2) + "\n")


def _points(method: str, seed: int, shares: Sequence[float | None], settings: Comparison) -> Any:
    """Train a method if that is not done, and yield a row for each share of saved layers."""
    from moe_kit.depth import calibrate_budget
    from moe_kit.depth.state import find_depth_state
    from moe_kit.hf.saving import load_adapters
    from moe_kit.training.depth import (
        evaluate_layers,
        open_recipe,
        search_layers,
        skip_least_important,
        train_layers,
    )

    recipe = recipe_of(method, seed, settings)
    start = time.perf_counter()
    if not (Path(recipe.output_dir) / "results.json").exists():
        if any(phase.kind == "supervised" for phase in recipe.phases):
            search_layers(recipe)
        train_layers(recipe, on_step=lambda kind, step, loss: _show(f"{method} {kind}")(step, loss))
    trained = time.perf_counter() - start
    work = open_recipe(dataclasses.replace(recipe, lora=None), 64)
    work.model.delete_adapter("depth")
    load_adapters(work.model, recipe.output_dir)
    merge_lora(work.model.eval())
    config, units = find_depth_state(work.model).configs["depth"], find_depth_state(work.model).units["depth"]
    layers = work.model.config.num_hidden_layers
    # a sub-layer is half a layer
    routed = len(units) * (1.0 if config.units == "layer" else 0.5)
    batches = list(itertools.islice(work.batches(16), CALIBRATED))
    if method == "importance":
        # it leaves the order of the layers with the router, from which every budget takes the first
        skip_least_important(work, batches)
    for saved in shares:
        if saved is not None:
            calibrate_budget(work.model, batches, saved * layers / routed)
        result = evaluate_layers(work.model, work.tokenizer, work.held_out, recipe)
        tasks = [task for task in result if task != "mean"]
        yield dict(
            method=method,
            seed=seed,
            saved=saved,
            budget=config.budget,
            steps=settings.steps,
            num_layers=layers,
            layers=round(result["mean"]["layers"], 3),
            nats_per_token=round(result["mean"]["nats_per_token"], 4),
            exact=round(result["mean"]["exact"], 4),
            tasks={task: [round(result[task]["nats_per_token"], 4), round(result[task]["exact"], 4)] for task in tasks},
            **_speed(work),
            trained_s=round(trained, 1),
        )


def merge_lora(model: nn.Module) -> None:
    """Merge what LoRA learned into the base weights, as one would before serving; layer routers stay as they are.

    Args:
        model: a model with native adapters, the LoRA among them active and without modules of its own to save.
    """
    from peft.tuners.lora import LoraLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    merged = {adapter for _, module in layers for adapter in module.lora_A}
    assert all(not model.peft_config[adapter].modules_to_save for adapter in merged), "only products can be merged"
    for name, module in layers:
        assert set(module.lora_A) <= set(module.active_adapters), "only what is active can be merged"
        module.merge(adapter_names=list(module.lora_A))
        # a wrapper that is left in place costs a token as much as the router of a layer
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    for adapter in merged:
        model.delete_adapter(adapter)


@torch.no_grad()
def _speed(work: Any, prompts: int = 4, rounds: int = 3) -> dict[str, float]:
    """Tokens/s of prefill and of decode for single prompts, and how much faster than with the layer routers off."""
    from moe_kit.training.encoding import encode_prompt

    model = work.model
    every = work.held_out[:: max(1, len(work.held_out) // prompts)][:prompts]
    batches = [torch.tensor([encode_prompt(example, work.tokenizer, work.recipe.data)]) for example in every]

    def run(ids: torch.Tensor) -> tuple[float, float]:
        start = time.perf_counter()
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        middle = time.perf_counter()
        for _ in range(DECODED):
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
        return ids.shape[1] / (middle - start), DECODED / (time.perf_counter() - middle)

    rates: dict[str, list[tuple[float, float]]] = {"on": [], "off": []}
    run(batches[0])
    for _ in range(rounds):
        for ids in batches:
            rates["on"].append(run(ids))
            model.disable_adapters()
            try:
                rates["off"].append(run(ids))
            finally:
                model.enable_adapters()
    found: dict[str, float] = {}
    for index, phase in enumerate(("prefill", "decode")):
        found[f"{phase}_tokens_s"] = round(statistics.median(rate[index] for rate in rates["on"]), 2)
        ratio = statistics.median(on[index] / off[index] for on, off in zip(rates["on"], rates["off"]))
        found[f"{phase}_speed_up"] = round(ratio, 3)
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a comparison; a torn last line is cut off the file, so that the next row starts a line."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.decode().splitlines()]


def front_of(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Pareto front of (compute, loss): points that no other beats in both.

    Args:
        points: any order.

    Returns:
        Ascending in compute, descending in loss.

    Example:
        >>> front_of([(30, 0.2), (20, 0.5), (25, 0.6), (28, 0.2)])
        [(20, 0.5), (28, 0.2)]
    """
    front: list[tuple[float, float]] = []
    for compute, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((compute, loss))
    return front


def plot(folder: Path) -> Path:
    """Draw quality over compute: answer loss against mean layers applied and against decoding speed.

    Args:
        folder: of a comparison.

    Returns:
        Path of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_rows(folder / "rows.jsonl")
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    measures: list[tuple[str, Callable[[dict], float]]] = [
        (f"layers applied, mean over prompts (of {rows[0]['num_layers']})", lambda row: row["layers"]),
        ("time of a decoded token, dense = 1 (batch 1)", lambda row: 1 / row["decode_speed_up"]),
    ]
    for axes, (title, compute) in zip(panels, measures):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = sorted((compute(row), row["nats_per_token"]) for row in rows if row["method"] == method)
            axes.plot(*zip(*mine), "o-", label=method, markersize=4, linewidth=0.8)
        front = front_of([(compute(row), row["nats_per_token"]) for row in rows])
        axes.step(*zip(*front), where="post", color="black", linewidth=1, linestyle=":", label="front")
        axes.set_xlabel(title)
        axes.set_yscale("log")
    panels[0].set_ylabel("loss of the right answer, nats a token")
    panels[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "quality_over_compute.png", dpi=150)
    plt.close(figure)
    return folder / "quality_over_compute.png"
