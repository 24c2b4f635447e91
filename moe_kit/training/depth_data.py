"""What the phases of a layer-router recipe work on: the model with its router, and batches of encoded examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.depth import LayerRoutingConfig
from moe_kit.errors import CheckpointError, ConfigError
from moe_kit.training.data import Example, load_examples
from moe_kit.training.depth_recipe import DepthRecipe
from moe_kit.training.encoding import Collator, EncodedExamples
from moe_kit.training.models import load_model_and_tokenizer

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
        learned: names of the parameters and buffers that came with the adapters.
    """

    model: nn.Module
    tokenizer: Any
    train: list[Example]
    held_out: list[Example]
    scorers: dict[str, Any]
    recipe: DepthRecipe
    learned: tuple[str, ...] = ()

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
            yield inputs_of(collate([rows[index] for index in order[start : start + size]]))


def inputs_of(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a collated batch that a model takes."""
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
    # adapters rename what they stand beside, so the base is told apart by identity
    base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    torch.manual_seed(recipe.seed)
    model.add_adapter(LayerRoutingConfig.from_preset(recipe.preset, **recipe.settings), DEPTH)
    if recipe.lora is not None:
        from peft import LoraConfig

        model.add_adapter(LoraConfig(**recipe.lora), LORA)
        model.set_adapter([DEPTH, LORA])
    sets = load_examples(recipe.data, train_examples=train_examples)
    named = (*model.named_parameters(), *model.named_buffers())
    learned = tuple(name for name, tensor in named if id(tensor) not in base)
    return OpenRecipe(model, tokenizer, list(sets.train), list(sets.held_out), sets.scorers, recipe, learned)
