"""The training part of a run: a wrapped model, encoded rows and the train section of a recipe -> trained weights.

Routed presets go through `moe_kit.RoutedTrainer`, plain LoRA through `transformers.Trainer`; both guarded, resumable and
interruptible.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moe_kit.errors import ConfigError
from moe_kit.training.encoding import Collator, EncodedExamples
from moe_kit.training.fields import build
from moe_kit.training.guard import guarded, last_checkpoint
from moe_kit.training.interrupt import interruptible
from moe_kit.training.progress import StepReporter, stepping
from moe_kit.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_kit.training.trainer import PolicyConfig

__all__ = ["fit", "policy_config"]


def fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedExamples,
    recipe: Recipe,
    folder: Path,
    *,
    console: Console,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a wrapped model.

    Args:
        model: A PEFT model; routed presets go through `moe_kit.RoutedTrainer`, LoRA through `transformers.Trainer`.
        tokenizer: Its tokenizer.
        encoded: Training rows.
        recipe: The recipe; its train section is used.
        folder: Folder for checkpoints.
        console: Where to show progress.
        resume: Go on from the last whole checkpoint in `folder`, if there is one.

    Returns:
        `steps`, `train_seconds` and `tokens` of this process in this run (not counting what was done before a resume),
        `processes`, `final_loss`.

    Raises:
        ConfigError: `train.trainer` has a field that the trainer's arguments lack, or `train.policy` one that is unknown.
        TrainingError: The loss is not finite.
        CheckpointError: A checkpoint cannot be saved.
    """
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    trainer_class, options = _trainer(model, recipe)
    try:
        arguments = TrainingArguments(**_trainer_arguments(recipe, folder))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train: {error}") from error
    trainer = guarded(trainer_class)(
        model=model,
        args=arguments,
        train_dataset=encoded,
        data_collator=Collator(pad_token_id=tokenizer.pad_token_id, answer_logits_only=_takes_logits_to_keep(model)),
        processing_class=tokenizer,
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder) if resume else None
    start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if checkpoint:
        console.print(f"    resuming after step {start}")
    began = time.perf_counter()
    with StepReporter(console, recipe.train.max_steps, "    training", start) as reporter, interruptible() as stopping:
        trainer.add_callback(stepping(reporter, lambda: trainer.tokens_seen))
        trainer.add_callback(stopping)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopping.asked:
        raise KeyboardInterrupt
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "train_seconds": round(time.perf_counter() - began, 1),
        "tokens": trainer.tokens_seen,
        "processes": trainer.args.world_size,
        "final_loss": losses[-1] if losses else None,
    }


def _trainer(model: Any, recipe: Recipe) -> tuple[type, dict[str, Any]]:
    """Choose the trainer for a PEFT model, with the options that only this trainer takes."""
    if all(config.peft_type == "LORA" for config in model.peft_config.values()):
        from transformers import Trainer

        return Trainer, {}
    from moe_kit import RoutedTrainer

    return RoutedTrainer, {"policy": policy_config(recipe)}


def policy_config(recipe: Recipe) -> PolicyConfig:
    """Read how sampled routers are trained.

    Args:
        recipe: The recipe; its `train.policy` is used.

    Returns:
        The checked configuration of the trainer.

    Raises:
        ConfigError: An unknown key (the nearest is named), or a value that is refused.
    """
    from moe_kit.training.trainer import PolicyConfig

    policy = build(PolicyConfig, recipe.train.policy, "train.policy")
    try:
        policy.validate()
    except ConfigError as error:
        raise ConfigError(f"train.policy: {error}") from error
    return policy


def _trainer_arguments(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Translate the train section into fields of `TrainingArguments`."""
    import torch

    train = recipe.train
    return {
        "output_dir": str(folder),
        "max_steps": train.max_steps,
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.learning_rate,
        "warmup_steps": train.warmup_steps,
        "lr_scheduler_type": train.schedule,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": train.bf16,
        "train_sampling_strategy": "group_by_length" if train.group_by_length else "random",
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        "save_total_limit": 2,
        "logging_steps": train.logging_steps,
        "report_to": list(train.report_to) or "none",
        "seed": train.seed,
        "data_seed": train.seed,
        # the collator makes exactly what the model takes, and the guard takes the ids out
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        # without this, several processes on CPUs would each train alone
        "use_cpu": not torch.accelerator.is_available(),
        # our own line replaces tqdm's bar
        "disable_tqdm": True,
        **train.trainer,
    }


def _takes_logits_to_keep(model: Any) -> bool:
    """Whether the base model can run its head on the last columns only."""
    import inspect

    return "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters
