"""One whole run, the code behind `moe-kit train`: load, evaluate, wrap, train, evaluate, save, report.

`run(recipe)` is also the function to call from Python; `train/finetune.py` calls it under `accelerate launch`.
Under several processes each trains its share and only the first evaluates, writes and prints.

The output folder is a normal PEFT folder (`PeftModel.from_pretrained` reads it) with these files beside the adapter:

=================  ================================================================
recipe.yaml        the recipe, every field; `moe-kit train DIR` repeats the run
results.json       the table's numbers, costs and versions
checkpoints/       the trainer's checkpoints; `--resume` goes on from the last whole one
=================  ================================================================
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.evaluation.generation import generate_answers
from moe_kit.evaluation.likelihood import answer_likelihood
from moe_kit.evaluation.scores import Score, best_constants, score_answers, score_one
from moe_kit.hf.adapter_files import replacing
from moe_kit.training.data import Example, ExampleSets, load_examples
from moe_kit.training.encoding import EncodedExamples
from moe_kit.training.fitting import fit, policy_config
from moe_kit.training.guard import last_checkpoint
from moe_kit.training.models import load_model_and_tokenizer, matmul_precision
from moe_kit.training.progress import counting
from moe_kit.training.recipe import AdapterConfig, Recipe, load_recipe, recipe_to_yaml
from moe_kit.training.results import Results, results_table, stored_scores, write_atomically, write_results
from moe_kit.training.wrapping import LORA, adapter_config, matched, trainable_parameters, wrap_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["evaluate", "fit", "load_run", "run", "training_examples"]

CHECKPOINTS = "checkpoints"


def run(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Results:
    """Carry out a recipe.

    Args:
        recipe: What to do.
        resume: Go on from the last whole checkpoint in the output folder, if there is one.
        console: Where to write; a console on standard output by default.

    Returns:
        Scores and costs, as written to `results.json`.

    Raises:
        ConfigError: The recipe cannot be carried out as written, or differs from the one being resumed.
        CheckpointError: Something cannot be saved.
        TrainingError: The loss is not finite.
        KeyboardInterrupt: Interrupted; the message says how to go on. During training the step under way is finished and
            saved first; a second interruption stops at once.
    """
    recipe.validate()
    stored_scores(recipe.eval.compare_row)
    first = int(os.environ.get("RANK", "0")) == 0
    console = console or Console(highlight=False, emoji=False, quiet=not first)
    folder = Path(recipe.output_dir)
    if first:
        _prepare_folder(recipe, folder, resume)
    try:
        with matmul_precision(recipe.model.matmul_precision):
            return _run(recipe, folder, console, resume, first)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_how_to_go_on(folder)) from stop


def _run(recipe: Recipe, folder: Path, console: Console, resume: bool, first: bool) -> Results:
    """Load, evaluate, train, evaluate, save and report, in this order."""
    lora_scores, lora_note = stored_scores(recipe.eval.compare_row)
    began = time.perf_counter()

    console.print(f"[bold]1/4[/] loading {escape(recipe.model.name)} and the data")
    sets = load_examples(recipe.data, train_examples=training_examples(recipe))
    model, tokenizer = load_model_and_tokenizer(recipe.model.name, dtype=recipe.model.dtype)
    _to_device(model)
    # a misspelt setting should not cost a baseline first
    adapter_config(model, recipe.adapter)
    policy_config(recipe)
    encoded = EncodedExamples(sets.train, tokenizer, recipe.data)
    constants = best_constants(sets.train, sets.held_out, sets.scorers)
    console.print(
        f"    {len(encoded)} training and {len(sets.held_out)} held-out questions of {len(constants)} tasks, none shared"
    )

    console.print("[bold]2/4[/] baselines")
    zero_shot: dict[str, Score] = {}
    if recipe.eval.zero_shot and first:
        zero_shot, _ = evaluate(model, tokenizer, sets, recipe, console, "    zero-shot")
    if recipe.eval.compare:
        lora_scores, lora_note = _train_lora(recipe, sets, encoded, tokenizer, console, resume), "same budget, this run"

    console.print(f"[bold]3/4[/] training {escape(recipe.adapter.preset)}")
    model = wrap_model(model, recipe.adapter, seed=recipe.train.seed)
    console.print(f"    adapts {escape(matched(model))}", soft_wrap=True)
    trainable, total = trainable_parameters(model)
    console.print(f"    {trainable:,} of {total:,} parameters are trainable ({100 * trainable / total:.2f} %)")
    costs = fit(model, tokenizer, encoded, recipe, folder / CHECKPOINTS, console=console, resume=resume)

    if not first:
        return Results(name=recipe.adapter.preset, ours={}, constants={})
    _save(model, tokenizer, folder)
    console.print("[bold]4/4[/] evaluation")
    ours, answers = evaluate(model, tokenizer, sets, recipe, console, "    held-out")
    likelihood = answer_likelihood(model, tokenizer, sets.held_out, recipe.data, batch_size=recipe.eval.batch_size)
    results = Results(
        name=recipe.adapter.preset,
        ours=ours,
        constants=constants,
        zero_shot=zero_shot,
        lora=lora_scores,
        lora_note=lora_note if lora_scores else "",
        details={
            **costs,
            "total_seconds": round(time.perf_counter() - began, 1),
            "trainable_parameters": trainable,
            "all_parameters": total,
            "likelihood": {task: dataclasses.asdict(value) for task, value in likelihood.items()},
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "moe-kit")},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        },
    )
    write_results(results, folder / "results.json")
    _report(results, sets, answers, recipe, console)
    return results


def _how_to_go_on(folder: Path) -> str:
    """Tell what an interrupted run left behind, and the command that takes it up."""
    found = [last_checkpoint(folder / name) for name in (CHECKPOINTS, f"{CHECKPOINTS}-{LORA}")]
    if not any(found):
        return f"There is no checkpoint yet: `moe-kit train {folder}` starts over."
    names = " and ".join(f"{path.parent.name}/{path.name}" for path in found if path)
    return f"{folder} holds {names}: `moe-kit train {folder} --resume` goes on from there."


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: ExampleSets,
    recipe: Recipe,
    console: Console,
    label: str,
) -> tuple[dict[str, Score], list[str]]:
    """Generate and score answers to the held-out questions.

    Args:
        model: Base or adapted model.
        tokenizer: Its tokenizer.
        sets: Examples and scorers.
        recipe: The recipe; its data and eval sections are used.
        console: Where to show progress.
        label: Text before the progress bar.

    Returns:
        Task -> score, and the answers in the order of `sets.held_out`.
    """
    with counting(console, len(sets.held_out), label) as advance:
        answers = generate_answers(
            model,
            tokenizer,
            sets.held_out,
            recipe.data,
            batch_size=recipe.eval.batch_size,
            max_new_tokens=recipe.eval.max_new_tokens,
            progress=advance,
        )
    return score_answers(sets.held_out, answers, sets.scorers), answers


def training_examples(recipe: Recipe) -> int:
    """Count the examples that the step budget consumes, one pass over the data.

    Args:
        recipe: The recipe.

    Returns:
        Steps times examples a step, over all processes.
    """
    train = recipe.train
    return train.max_steps * train.batch_size * train.gradient_accumulation * int(os.environ.get("WORLD_SIZE", "1"))


def load_run(folder: str | Path) -> tuple[PeftModel, PreTrainedTokenizerBase, Recipe]:
    """Load what `moe-kit train` saved.

    Args:
        folder: Its output folder.

    Returns:
        The adapted model in eval mode, the tokenizer, and the recipe.

    Raises:
        CheckpointError: The folder has no recipe or no adapter, or the adapter does not fit.
    """
    from peft import PeftModel

    import moe_kit  # noqa: F401  registers the PEFT types

    folder = Path(folder)
    for name in ("recipe.yaml", "adapter_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: give an output folder of a finished `moe-kit train`")
    recipe = load_recipe(folder)
    model, tokenizer = load_model_and_tokenizer(recipe.model.name, dtype=recipe.model.dtype)
    _to_device(model)
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval(), tokenizer, recipe
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter in {folder} cannot be loaded on {recipe.model.name}: {error}. It may be truncated or belong to"
            " another base; train again, or copy the folder again."
        ) from error


def _prepare_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Create the output folder and write the recipe; on resume, check that it is the same run."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file, expected a folder")
    ours = (folder / "recipe.yaml").is_file()
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise ConfigError(f"output_dir: {folder} holds files of something else; choose another --output_dir")
    if resume and ours:
        before = load_recipe(folder)
        different = [
            f.name
            for f in dataclasses.fields(Recipe)
            if f.name not in ("eval", "output_dir") and getattr(before, f.name) != getattr(recipe, f.name)
        ]
        if different:
            raise ConfigError(
                f"--resume: sections {different} differ from {folder / 'recipe.yaml'}; a resumed run must be the same."
                f" Use `moe-kit train {folder} --resume`, or leave --resume out to start over."
            )
    elif ours:
        # starting over: checkpoints of the older run would be taken for this one's on a later --resume
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        shutil.rmtree(folder / f"{CHECKPOINTS}-{LORA}", ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"output_dir: cannot create {folder}: {error}") from error
    write_atomically(folder / "recipe.yaml", recipe_to_yaml(recipe))


def _train_lora(
    recipe: Recipe,
    sets: ExampleSets,
    encoded: EncodedExamples,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    resume: bool,
) -> dict[str, Score]:
    """Train and score plain LoRA with the same data, steps and layers, at the rank that is active in the mixture."""
    settings = recipe.adapter.settings
    rank = settings.get("r", 8) * settings.get("top_k", 2)
    lora = AdapterConfig(
        preset=LORA,
        upper_layers=recipe.adapter.upper_layers,
        settings={
            "r": rank,
            "lora_alpha": 2 * rank,
            **{key: settings[key] for key in ("target_modules", "layers_to_transform") if key in settings},
        },
    )
    console.print(f"    plain LoRA of rank {rank}, for comparison")
    model, _ = load_model_and_tokenizer(recipe.model.name, dtype=recipe.model.dtype)
    model = wrap_model(_to_device(model), lora, seed=recipe.train.seed)
    folder = Path(recipe.output_dir) / f"{CHECKPOINTS}-{LORA}"
    plain = dataclasses.replace(recipe, adapter=lora)
    fit(model, tokenizer, encoded, plain, folder, console=console, resume=resume)
    scores, _ = evaluate(model, tokenizer, sets, recipe, console, "    LoRA, held-out")
    return scores


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter and the tokenizer into the output folder, whole or not at all: an older adapter survives."""
    try:
        with replacing(folder, last="adapter_config.json") as new:
            model.save_pretrained(str(new))
            tokenizer.save_pretrained(str(new))
    except (OSError, RuntimeError, SafetensorError) as error:
        # a full disk shows as any of the three, by who writes
        raise CheckpointError(
            f"cannot save the adapter to {folder}: {error}. Make room, then run with --resume."
        ) from error


def _report(results: Results, sets: ExampleSets, answers: list[str], recipe: Recipe, console: Console) -> None:
    """Print the table, some generations and what to do next."""
    console.print()
    console.print(results_table(results))
    console.print(f"Mean gain over the best constant answer: [bold]{results.mean_gain:+.1f} points[/]")
    for example, answer in _shown(sets.held_out, answers, recipe.eval.show):
        mark = "right" if score_one(example, answer, sets.scorers) >= 1 else f"expected {example.answer!r}"
        question = " ".join(example.messages[-1]["content"].split())[-160:]
        # tasks, questions and answers are text of others, in which [/INST] is no markup
        console.print(f"  [dim]{escape(example.task)}[/] {escape(question)}\n    -> {escape(f'{answer!r} ({mark})')}")
    folder = escape(str(recipe.output_dir))
    console.print(f"\nSaved to {folder}. Next:", soft_wrap=True)
    for command, text in (
        (f"moe-kit generate {folder} --prompt '...'", "ask it something"),
        (f"moe-kit eval {folder} --data.eval_examples 300", "evaluate on more questions"),
        (f"moe-kit inspect {folder}", "what was adapted, parameters, FLOPs, routers"),
        ("moe-kit train quickstart_remix", "the same with another method; moe-kit presets lists all"),
    ):
        console.print(f"  {command}\n      [dim]{text}[/]", soft_wrap=True)


def _shown(examples: tuple[Example, ...], answers: list[str], count: int) -> list[tuple[Example, str]]:
    """Pick the first examples of different tasks."""
    by_task: dict[str, list[tuple[Example, str]]] = {}
    for example, answer in zip(examples, answers):
        by_task.setdefault(example.task, []).append((example, answer))
    # one of each task, then a second of each, and so on
    rounds = [pairs[i] for i in range(max(map(len, by_task.values()))) for pairs in by_task.values() if i < len(pairs)]
    return rounds[:count]


def _to_device(model: Any) -> Any:
    """Move a model to the accelerator if there is one."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(accelerator) if accelerator else model
