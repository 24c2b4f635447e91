"""Layer-router recipes: from one YAML file to a trained, evaluated layer router.

A recipe names a model, data, a preset and a list of phases (`moe_kit.depth.fit`), which run in order; the evaluation
follows. The run can be killed at any moment and goes on with `resume` (`depth_progress`). The label search is in
`depth_labels`, the evaluation in `depth_evaluation`, batches and the model in `depth_data`.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_kit.depth.calibrate import calibrate_budget
from moe_kit.depth.fit import FitConfig, fit_end_to_end, fit_forecasters, fit_others, fit_policy, fit_supervised
from moe_kit.depth.loop import Keeper
from moe_kit.depth.measure import layer_importance
from moe_kit.depth.routers import fixed_layers
from moe_kit.depth.search import read_labels
from moe_kit.depth.state import find_depth_state
from moe_kit.depth.steer import set_budget
from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.hf.saving import save_adapters
from moe_kit.training.depth_data import DEPTH, LORA, OpenRecipe, example_batches, inputs_of, open_recipe
from moe_kit.training.depth_evaluation import evaluate_layers
from moe_kit.training.depth_labels import digest_of, search_layers
from moe_kit.training.depth_progress import FOLDER, Progress
from moe_kit.training.depth_recipe import DepthRecipe, PhaseConfig, SearchSection, load_depth_recipe, settings_of
from moe_kit.training.encoding import Collator, EncodedExamples
from moe_kit.training.interrupt import interruptible
from moe_kit.training.recipe import recipe_to_yaml
from moe_kit.training.results import write_atomically

__all__ = [
    "DepthRecipe",
    "PhaseConfig",
    "SearchSection",
    "evaluate_layers",
    "example_batches",
    "load_depth_recipe",
    "open_recipe",
    "run_depth",
    "search_layers",
    "skip_least_important",
    "train_layers",
]

# may differ between a run and its resumption
_FREE = ("output_dir", "save_steps", "eval_batch_size")
# batches of a phase that measures and does not train
_MEASURED = 8


def run_depth(
    config: DepthRecipe | str | Path | dict,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    on_step: Callable[[str, int, float], None] | None = None,
) -> dict[str, Any]:
    """Read a recipe and train it: what a command line calls.

    Args:
        config: a recipe, a YAML file, the name of a shipped one (`depth/first`), the folder of an earlier run, or a
            recipe's content as a dict.
        overrides: words such as `--seed 1`, for a file, a name or a dict.
        resume: go on where an interrupted run with this `output_dir` stopped.
        on_step: called with the phase's kind, the step and its loss.

    Returns:
        What `results.json` in the recipe's `output_dir` holds.

    Raises:
        ConfigError: if the recipe cannot be read, or a key or value is wrong, or differs from the one being resumed.
        CheckpointError: if it needs searched labels and there are none.
    """
    if isinstance(config, DepthRecipe) and overrides:
        raise ConfigError(f"options {list(overrides)} were given with a finished recipe: give the file or its content.")
    recipe = config if isinstance(config, DepthRecipe) else load_depth_recipe(config, overrides)
    return train_layers(recipe, resume=resume, on_step=on_step)


def train_layers(
    recipe: DepthRecipe, *, resume: bool = False, on_step: Callable[[str, int, float], None] | None = None
) -> dict[str, Any]:
    """Run the phases of a recipe, evaluate on held-out examples, save adapters and results.

    Args:
        recipe: the recipe.
        resume: go on where an interrupted run with this `output_dir` stopped; a finished run returns its results, and
            without anything to go on from the run starts over.
        on_step: called with the phase's kind, the step and its loss.

    Returns:
        What `results.json` holds: losses of the phases, answer loss and layers applied, by task and in the mean.

    Raises:
        ConfigError: if the recipe differs from the one being resumed.
        CheckpointError: if `supervised` finds no labels (`moe-kit search-layers` makes them), or the kept state cannot
            be read.
        KeyboardInterrupt: interrupted; the message says how to go on. While a phase trains, the step under way is
            finished and kept first; a second interruption stops at once.
    """
    folder = Path(recipe.output_dir)
    _prepare(recipe, folder, resume)
    if resume and (folder / "results.json").is_file():
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))
    try:
        return _train(recipe, folder, resume, on_step)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"`moe-kit train {folder} --resume` goes on from what {folder} holds.") from stop


def _train(
    recipe: DepthRecipe, folder: Path, resume: bool, on_step: Callable[[str, int, float], None] | None
) -> dict[str, Any]:
    need = max([settings_of(FitConfig, p.settings, "").steps * p.batch_size for p in recipe.phases], default=64)
    work = open_recipe(recipe, max(need, recipe.search.questions))
    config = find_depth_state(work.model).configs[DEPTH]
    progress = Progress(folder, work.model, work.learned, config, recipe.save_steps, resume)
    for phase in recipe.phases[progress.phase :]:

        def step(index: int, loss: float, kind: str = phase.kind) -> None:
            if on_step is not None:
                on_step(kind, index, loss)

        with interruptible() as progress.stopping:
            result = _run_phase(work, phase, step, progress)
        progress.stopping = None
        progress.end_phase({"kind": phase.kind, **result})
    results: dict[str, Any] = {"preset": recipe.preset, "seed": recipe.seed, "phases": progress.results}
    results["held_out"] = evaluate_layers(work.model, work.tokenizer, work.held_out, recipe, kept=progress.evaluation)
    save_adapters(work.model, folder)
    write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    progress.remove()
    return results


def _prepare(recipe: DepthRecipe, folder: Path, resume: bool) -> None:
    """Create the output folder and write the recipe; on resume, check that it is the same run."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file, expected a folder")
    stored = folder / "recipe.yaml"
    if resume and stored.is_file():
        before = load_depth_recipe(stored)
        different = [
            field.name
            for field in dataclasses.fields(DepthRecipe)
            if field.name not in _FREE and getattr(before, field.name) != getattr(recipe, field.name)
        ]
        if different:
            raise ConfigError(
                f"--resume: {different} differ from {stored}; a resumed run must be the same. "
                f"Use `moe-kit train {folder} --resume`, or leave --resume out to start over."
            )
    else:
        # what an older run left would be taken for this one's on a later --resume
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        (folder / "results.json").unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"output_dir: cannot create {folder}: {error}") from error
    write_atomically(stored, recipe_to_yaml(recipe))


def _run_phase(
    work: OpenRecipe, phase: PhaseConfig, step: Callable[[int, float], None], progress: Progress
) -> dict[str, Any]:
    """Run one phase; returns what `results.json` says of it."""
    config = settings_of(FitConfig, phase.settings, "phases.settings")
    batches = work.batches(phase.batch_size)
    if phase.kind == "importance":
        return {"skip_layers": skip_least_important(work, [next(batches) for _ in range(_MEASURED)])}
    if phase.kind == "calibrate":
        target = find_depth_state(work.model).configs[DEPTH].target_rate
        budget, saved = calibrate_budget(work.model, [next(batches) for _ in range(_MEASURED)], target)
        return {"budget": budget, "saved": saved}
    if phase.kind == "supervised":
        history = _supervised(work, phase, config, step, progress)
    elif phase.kind == "lora":
        history = fit_others(work.model, batches, config, adapters=[LORA], on_step=step, keeper=progress)
    else:
        loops: dict[str, Callable] = {
            "end_to_end": fit_end_to_end,
            "forecasters": fit_forecasters,
            "policy": fit_policy,
        }
        history = loops[phase.kind](work.model, batches, config, on_step=step, keeper=progress)
    return {"steps": len(history), "last_loss": history[-1]}


def _supervised(work: OpenRecipe, phase: PhaseConfig, config: FitConfig, step: Callable, keeper: Keeper) -> list[float]:
    found = {label["id"]: label for label in read_labels(work.recipe.search.output)}
    examples = [example for example in work.train if example.example_id in found]
    if not examples:
        raise CheckpointError(
            f"{work.recipe.search.output} labels none of the training examples: search with this recipe's data section."
        )
    labels = {name: label["actions"] for name, label in found.items()}
    other = [e.example_id for e in examples if found[e.example_id].get("digest") != digest_of(e, work.recipe.data)]
    if other:
        raise CheckpointError(
            f"{work.recipe.search.output} labels other questions than this recipe's under the same names, or was written "
            f"without digests of its questions: {len(other)}, {other[0]} say. Search with this recipe, into another file."
        )
    rows = EncodedExamples(examples, work.tokenizer, work.recipe.data)
    collate = Collator(pad_token_id=work.tokenizer.pad_token_id, answer_logits_only=False)
    generator = torch.Generator().manual_seed(work.recipe.seed)

    def data() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            index = torch.randint(len(rows), (phase.batch_size,), generator=generator).tolist()
            batch = collate([rows[i] for i in index])
            actions = torch.tensor([labels[name] for name in batch["example_ids"]])
            yield _prompts(inputs_of(batch)), actions

    counts = [sum(row.count(action) for row in labels.values()) for action in range(3)]
    return fit_supervised(work.model, data(), config, class_counts=counts, on_step=step, keeper=keeper)


def _prompts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt alone: its tokens are those before the first label."""
    prompt_BS = ((batch["labels"] != -100).long().cumsum(1) == 0) & batch["attention_mask"].bool()
    return {"input_ids": batch["input_ids"], "attention_mask": prompt_BS.long()}


def skip_least_important(work: OpenRecipe, batches: list[dict[str, Tensor]]) -> list[int]:
    """Let a static router skip the layers that change their input least, as many as its budget says.

    Args:
        work: an opened recipe with a fixed router per layer.
        batches: examples to measure the layers' influence on.

    Returns:
        The skipped layers.
    """
    state = find_depth_state(work.model)
    config, units = state.configs[DEPTH], state.units[DEPTH]
    influence = layer_importance(work.model, batches)
    order = sorted({unit.layer for unit in units.values()}, key=lambda index: float(influence[index]))
    # the order stays with the router, so that another budget skips the least important layers too
    config.skip_layers, config.skip_order = None, order
    set_budget(work.model, config.budget)
    return sorted(fixed_layers(config, sorted(order)))
