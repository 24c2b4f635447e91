"""Layer-router recipes: from one YAML file to a trained, evaluated layer router, and to searched labels.

A recipe names a model, data, a preset and a list of phases (`moe_kit.depth.fit`). Everything that the phases need is
made here: batches of encoded examples, searched labels, a LoRA adapter beside the router. `moe-kit search-layers` and
`train/depth_train.py` are thin callers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_kit.depth import LayerRoutingConfig, force_layers, layer_applications
from moe_kit.depth.fit import (
    FitConfig,
    fit_end_to_end,
    fit_forecasters,
    fit_others,
    fit_policy,
    fit_supervised,
)
from moe_kit.depth.measure import layer_importance
from moe_kit.depth.search import SearchConfig, read_labels, search_paths, statistics
from moe_kit.depth.state import find_depth_state
from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.hf.saving import save_adapters
from moe_kit.training.data import Example, load_examples
from moe_kit.training.depth_recipe import DepthRecipe, PhaseConfig, SearchSection, load_depth_recipe, settings_of
from moe_kit.training.encoding import Collator, EncodedExamples, encode_prompt
from moe_kit.training.models import load_model_and_tokenizer
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
    "train_layers",
]

DEPTH, LORA = "depth", "lora"


@dataclass
class OpenRecipe:
    """A model with its router, and examples.

    Attributes:
        model: native model; the router is its adapter `depth`, a LoRA beside it `lora`.
        tokenizer: its tokenizer.
        train: training examples.
        held_out: examples of the evaluation.
        scorers: task -> scorer.
        recipe: the recipe.
    """

    model: nn.Module
    tokenizer: Any
    train: list[Example]
    held_out: list[Example]
    scorers: dict[str, Any]
    recipe: DepthRecipe

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Endless batches of training examples, in an order that the seed fixes."""
        return example_batches(self.train, self.tokenizer, self.recipe, size)


def example_batches(
    examples: Sequence[Example], tokenizer: Any, recipe: DepthRecipe, size: int
) -> Iterator[dict[str, Tensor]]:
    """Endless batches of examples, in an order that the recipe's seed fixes.

    Args:
        examples: at least `size` that are not too long.
        tokenizer: the model's tokenizer.
        recipe: for its data section and its seed.
        size: examples in a batch.

    Yields:
        `input_ids`, `attention_mask`, `labels`.

    Raises:
        ConfigError: if there are fewer examples than a batch needs.
    """
    rows = EncodedExamples(examples, tokenizer, recipe.data)
    if len(rows) < size:
        raise ConfigError(f"{len(rows)} examples are left for batches of {size}: give more, or a smaller batch_size.")
    collate = Collator(pad_token_id=tokenizer.pad_token_id, answer_logits_only=False)
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield _inputs(collate([rows[index] for index in order[start : start + size]]))


def _inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def open_recipe(recipe: DepthRecipe, train_examples: int) -> OpenRecipe:
    """Load the model of a recipe, merge its base adapter, add its router, and load its examples.

    Args:
        recipe: the recipe.
        train_examples: training examples to load.

    Returns:
        All that the phases need.
    """
    model, tokenizer = load_model_and_tokenizer(recipe.model.name, dtype=recipe.model.dtype)
    if recipe.base_adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, recipe.base_adapter).merge_and_unload()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot load the base_adapter {recipe.base_adapter!r} on {recipe.model.name}: {error}. Train it first "
                "(moe-kit train quickstart_lora), or set base_adapter to another folder or to null."
            ) from error
        model.peft_config = {}
        del model.peft_config
    torch.manual_seed(recipe.seed)
    model.add_adapter(LayerRoutingConfig.from_preset(recipe.preset, **recipe.settings), DEPTH)
    if recipe.lora is not None:
        from peft import LoraConfig

        model.add_adapter(LoraConfig(**recipe.lora), LORA)
        model.set_adapter([DEPTH, LORA])
    sets = load_examples(recipe.data, train_examples=train_examples)
    return OpenRecipe(model, tokenizer, list(sets.train), list(sets.held_out), sets.scorers, recipe)


def search_layers(
    recipe: DepthRecipe, *, progress: Callable[[int, int, dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Search routes for training examples and write them as JSONL.

    Args:
        recipe: the recipe; its `search` section.
        progress: called with trees done, trees in all, and the label just found.

    Returns:
        Statistics of the labels.

    Raises:
        ConfigError: if the preset cannot be searched (it needs whole layers per sequence).
        CheckpointError: if the output was written with other settings.
    """
    config = LayerRoutingConfig.from_preset(recipe.preset, **recipe.settings)
    if config.units != "layer" or config.scope != "sequence":
        raise ConfigError(
            f"search-layers needs a preset that routes whole layers per sequence; {recipe.preset!r} does not."
        )
    work = open_recipe(recipe, recipe.search.questions)
    state = find_depth_state(work.model)
    examples = work.train[: recipe.search.questions]
    settings = dict(recipe.search.settings)
    settings.setdefault("repeats", "repeat" in config.actions)
    evaluate = _likelihood(work, examples) if recipe.search.scorer == "likelihood" else _exact(work, examples)
    done = [0]

    def step(label: dict[str, Any]) -> None:
        done[0] += 1
        if progress is not None:
            progress(done[0], len(examples), label)

    work.model.eval()
    labels = search_paths(
        [example.example_id for example in examples],
        evaluate,
        num_layers=state.num_layers,
        routable=sorted(state.units[DEPTH]),
        config=settings_of(SearchConfig, settings, "search.settings"),
        output=recipe.search.output,
        progress=step,
    )
    return statistics(labels, state.num_layers)


def _likelihood(work: OpenRecipe, examples: Sequence[Example]) -> Callable:
    """Geometric mean probability of the right answer's tokens."""
    rows = EncodedExamples(examples, work.tokenizer, work.recipe.data)
    if len(rows) != len(examples):
        raise ConfigError(
            "some examples are longer than data.max_length and were dropped: set data.too_long: cut_prompt."
        )
    collate = Collator(pad_token_id=work.tokenizer.pad_token_id, answer_logits_only=False)

    @torch.no_grad()
    def evaluate(asked: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
        batch = _inputs(collate([rows[index] for index, _ in asked]))
        labels_BS = batch.pop("labels")[:, 1:]
        with force_layers(work.model, [list(path) for _, path in asked]):
            logits_BSV = work.model(**batch, use_cache=False).logits[:, :-1]
        loss_BS = functional.cross_entropy(
            logits_BSV.float().transpose(1, 2), labels_BS, ignore_index=-100, reduction="none"
        )
        return torch.exp(-loss_BS.sum(1) / (labels_BS != -100).sum(1).clamp_min(1)).tolist()

    return evaluate


def _exact(work: OpenRecipe, examples: Sequence[Example]) -> Callable:
    """The task's own scorer on a greedy answer."""
    from moe_kit.evaluation.scores import score_one

    prompts = [encode_prompt(example, work.tokenizer, work.recipe.data) for example in examples]

    @torch.no_grad()
    def evaluate(asked: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
        width = max(len(prompts[index]) for index, _ in asked)
        ids_BS = torch.full((len(asked), width), work.tokenizer.pad_token_id)
        mask_BS = torch.zeros_like(ids_BS)
        for row, (index, _) in enumerate(asked):
            ids_BS[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask_BS[row, width - len(prompts[index]) :] = 1
        with force_layers(work.model, [list(path) for _, path in asked]):
            out_BS = work.model.generate(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                max_new_tokens=work.recipe.search.max_new_tokens,
                do_sample=False,
                eos_token_id=work.tokenizer.eos_token_id,
                pad_token_id=work.tokenizer.pad_token_id,
            )
        answers = work.tokenizer.batch_decode(out_BS[:, width:], skip_special_tokens=True)
        return [score_one(examples[index], answer.strip(), work.scorers) for (index, _), answer in zip(asked, answers)]

    return evaluate


def run_depth(
    config: DepthRecipe | str | Path | dict,
    overrides: Sequence[str] = (),
    *,
    on_step: Callable[[str, int, float], None] | None = None,
) -> dict[str, Any]:
    """Read a recipe and train it: what a command line calls.

    Args:
        config: a recipe, a YAML file, the name of a shipped one (`depth/first`), or its content as a dict.
        overrides: words such as `--seed 1`, for a file, a name or a dict.
        on_step: called with the phase's kind, the step and its loss.

    Returns:
        What `results.json` in the recipe's `output_dir` holds.

    Raises:
        ConfigError: if the recipe cannot be read, or a key or value is wrong.
        CheckpointError: if it needs searched labels and there are none.
    """
    if isinstance(config, DepthRecipe) and overrides:
        raise ConfigError(f"options {list(overrides)} were given with a finished recipe: give the file or its content.")
    recipe = config if isinstance(config, DepthRecipe) else load_depth_recipe(config, overrides)
    return train_layers(recipe, on_step=on_step)


def train_layers(recipe: DepthRecipe, *, on_step: Callable[[str, int, float], None] | None = None) -> dict[str, Any]:
    """Run the phases of a recipe, evaluate on held-out examples, save adapters and results.

    Args:
        recipe: the recipe.
        on_step: called with the phase's kind, the step and its loss.

    Returns:
        What `results.json` holds: losses of the phases, answer loss and layers applied, by task and in the mean.

    Raises:
        CheckpointError: if `supervised` finds no labels; `moe-kit search-layers` makes them.
    """
    need = max([settings_of(FitConfig, p.settings, "").steps * p.batch_size for p in recipe.phases], default=64)
    work = open_recipe(recipe, max(need, recipe.search.questions))
    results: dict[str, Any] = {"preset": recipe.preset, "seed": recipe.seed, "phases": []}
    for phase in recipe.phases:

        def step(index: int, loss: float, kind: str = phase.kind) -> None:
            if on_step is not None:
                on_step(kind, index, loss)

        history = _run_phase(work, phase, step)
        results["phases"].append(
            {"kind": phase.kind, "steps": len(history), "last_loss": history[-1] if history else None}
        )
    results["held_out"] = evaluate_layers(work.model, work.tokenizer, work.held_out, recipe)
    folder = Path(recipe.output_dir)
    save_adapters(work.model, folder)
    write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def _run_phase(work: OpenRecipe, phase: PhaseConfig, step: Callable[[int, float], None]) -> list[float]:
    config = settings_of(FitConfig, phase.settings, "phases.settings")
    batches = work.batches(phase.batch_size)
    if phase.kind == "supervised":
        return _supervised(work, phase, config, step)
    if phase.kind == "lora":
        return fit_others(work.model, batches, config, adapters=[LORA], on_step=step)
    if phase.kind == "importance":
        _skip_least_important(work, [next(batches) for _ in range(8)])
        return []
    loops: dict[str, Callable] = {"end_to_end": fit_end_to_end, "forecasters": fit_forecasters, "policy": fit_policy}
    return loops[phase.kind](work.model, batches, config, on_step=step)


def _supervised(work: OpenRecipe, phase: PhaseConfig, config: FitConfig, step: Callable) -> list[float]:
    labels = {label["id"]: label["actions"] for label in read_labels(work.recipe.search.output)}
    examples = [example for example in work.train if example.example_id in labels]
    if not examples:
        raise CheckpointError(
            f"{work.recipe.search.output} labels none of the training examples: search with this recipe's data section."
        )
    rows = EncodedExamples(examples, work.tokenizer, work.recipe.data)
    collate = Collator(pad_token_id=work.tokenizer.pad_token_id, answer_logits_only=False)
    generator = torch.Generator().manual_seed(work.recipe.seed)

    def data() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            index = torch.randint(len(rows), (phase.batch_size,), generator=generator).tolist()
            batch = collate([rows[i] for i in index])
            actions = torch.tensor([labels[name] for name in batch["example_ids"]])
            yield _prompts(_inputs(batch)), actions

    counts = [sum(row.count(action) for row in labels.values()) for action in range(3)]
    return fit_supervised(work.model, data(), config, class_counts=counts, on_step=step)


def _prompts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt alone: its tokens are those before the first label."""
    prompt_BS = ((batch["labels"] != -100).long().cumsum(1) == 0) & batch["attention_mask"].bool()
    return {"input_ids": batch["input_ids"], "attention_mask": prompt_BS.long()}


def _skip_least_important(work: OpenRecipe, batches: list[dict[str, Tensor]]) -> None:
    state = find_depth_state(work.model)
    config, units = state.configs[DEPTH], state.units[DEPTH]
    influence = layer_importance(work.model, batches)
    order = sorted({unit.layer for unit in units.values()}, key=lambda index: float(influence[index]))
    config.skip_layers = sorted(order[: round(config.budget * len(order))])
    for unit in units.values():
        unit.moe_depth_router[DEPTH].action.fill_(0 if unit.layer in config.skip_layers else 1)


@torch.no_grad()
def evaluate_layers(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], recipe: DepthRecipe
) -> dict[str, Any]:
    """Loss of the right answers and layers applied, the route decided from the prompt.

    Args:
        model: a model with layer routers.
        tokenizer: its tokenizer.
        examples: held-out examples.
        recipe: for the data section and the batch size.

    Returns:
        Task -> `nats_per_token`, `exact` (share of examples whose every answer token is the most likely one, which is
        what greedy decoding would answer), `layers` (mean applications of all layers), `count`; and `mean` over tasks.
    """
    rows = EncodedExamples(examples, tokenizer, recipe.data)
    tasks = {example.example_id: example.task for example in examples}
    collate = Collator(pad_token_id=tokenizer.pad_token_id, answer_logits_only=False)
    found: dict[str, list[tuple[float, int, float, bool]]] = {}
    model.eval()
    for start in range(0, len(rows), recipe.eval_batch_size):
        batch = collate([rows[index] for index in range(start, min(start + recipe.eval_batch_size, len(rows)))])
        inputs = _inputs(batch)
        logits_BSV = model(**inputs, use_cache=False).logits[:, :-1]
        labels_BS = inputs["labels"][:, 1:]
        loss_BS = functional.cross_entropy(
            logits_BSV.float().transpose(1, 2), labels_BS, ignore_index=-100, reduction="none"
        )
        layers_B = layer_applications(model).float().sum(1)
        counts_B = (labels_BS != -100).sum(1)
        exact_B = ((logits_BSV.argmax(-1) == labels_BS) | (labels_BS == -100)).all(1)
        for name, *values in zip(
            batch["example_ids"], loss_BS.sum(1).tolist(), counts_B.tolist(), layers_B.tolist(), exact_B.tolist()
        ):
            found.setdefault(tasks[name], []).append(tuple(values))
    out: dict[str, Any] = {}
    for task, values in found.items():
        out[task] = {
            "nats_per_token": sum(v[0] for v in values) / max(1, sum(v[1] for v in values)),
            "exact": sum(v[3] for v in values) / len(values),
            "layers": sum(v[2] for v in values) / len(values),
            "count": len(values),
        }
    keys = ("nats_per_token", "exact", "layers")
    out["mean"] = {key: sum(out[task][key] for task in found) / len(found) for key in keys}
    return out
