"""Searched routes for the training examples of a recipe: the labels of `dr_llm`.

Shapes: B rows, S sequence, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from moe_kit.depth import LayerRoutingConfig, force_layers
from moe_kit.depth.search import SearchConfig, search_paths, statistics
from moe_kit.depth.state import find_depth_state
from moe_kit.errors import ConfigError
from moe_kit.training.data import Example
from moe_kit.training.depth_data import DEPTH, OpenRecipe, inputs_of, open_recipe
from moe_kit.training.depth_recipe import DepthRecipe, settings_of
from moe_kit.training.encoding import Collator, EncodedExamples, encode_prompt
from moe_kit.training.recipe import DataConfig


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
        CheckpointError: if the output was written with other settings, by another model or scorer, or about other
            questions of the same names.
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
        digests=[digest_of(example, recipe.data) for example in examples],
        source={
            "model": recipe.model.name,
            "base_adapter": recipe.base_adapter,
            "scorer": recipe.search.scorer,
            "max_new_tokens": recipe.search.max_new_tokens if recipe.search.scorer == "exact" else None,
        },
    )
    return statistics(labels, state.num_layers)


def digest_of(example: Example, data: DataConfig) -> str:
    """Tells a question from another one of the same name (`task/index`).

    Args:
        example: the question.
        data: the data section, whose system prompt stands before it.

    Returns:
        Sixteen hexadecimal digits of prompt and answer.
    """
    content = json.dumps([data.system_prompt, example.messages, example.answer], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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
        batch = inputs_of(collate([rows[index] for index, _ in asked]))
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
