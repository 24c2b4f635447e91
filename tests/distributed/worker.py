"""What one of two processes runs: a training step for each case, gradients written to a file.

`run(case, folder, size, steps)` is what the single process runs as well.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from moe_kit import RoutedTrainer, routing_inputs
from moe_kit.training.trainer import PolicyConfig
from tests.conformance.common import Caught, routed, rows


class TypedTrainer(Trainer):
    """Hands each row's type of data to the routers, as a user's training step does."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        types = inputs.pop("task_types")
        with routing_inputs(self.accelerator.unwrap_model(model), task_types=types):
            return super().compute_loss(model, inputs, *args, **kwargs)


SAMPLES = 3
AUX = dict(losses={"switch": 1.0, "z": 0.1}, target_modules=["q_proj", "up_proj"])
TYPED = {**AUX, "preset": "dense_lora_moe", "losses": {"cv_typed": 1.0}, "loss_options": {"cv_typed": {"delta": 0.3}}}
CASES = {
    "micro": (Trainer, AUX, {}),
    "global": (Trainer, {**AUX, "balance_scope": "global"}, {}),
    "micro_smoothed": (Trainer, AUX, {"label_smoothing_factor": 0.1}),
    "micro_unused": (Trainer, AUX, {"label_smoothing_factor": 0.1, "ddp_find_unused_parameters": True}),
    "global_smoothed": (RoutedTrainer, {**AUX, "balance_scope": "global"}, {"label_smoothing_factor": 0.1}),
    "micro_typed": (TypedTrainer, TYPED, {"remove_unused_columns": False}),
    "global_typed": (TypedTrainer, {**TYPED, "balance_scope": "global"}, {"remove_unused_columns": False}),
    "sampled": (
        RoutedTrainer,
        dict(preset="remix", target_modules=["down_proj"], layers_to_transform=[1], score_options={"init_std": 0.5}),
        {},
    ),
    "loss_free": (Trainer, dict(preset="loss_free", target_modules=["q_proj"]), {}),
}


def data(typed=False):
    """Four rows with different numbers of labels and some padding, and on request a type of data each."""
    examples = rows(4)
    for index, row in enumerate(examples):
        row["labels"][: 1 + index] = -100
        row["attention_mask"][:index] = 0
        if typed:
            # the processes hold different shares of the two types
            row["task_types"] = torch.tensor(int(index in (1, 2, 3)))
    return examples


def noise_by_content(calls=[0]):  # noqa: B006  one counter for the whole process, on purpose
    """Uniform noise that depends on the scores and on which of the samples this is, not on who draws it."""

    def noise(scores):
        sample = calls[0] % SAMPLES
        calls[0] += 1
        return ((scores.detach() * 12.9898 + 78.233 * (sample + 1)).sin() * 43758.5453).frac().abs()

    return noise


def run(case, folder, size, steps):
    trainer_class, options, overrides = CASES[case]
    more = {}
    original = torch.rand_like
    if case == "sampled":
        more["policy"] = PolicyConfig(num_samples=SAMPLES, adapter_gradient="mean")
        torch.rand_like = noise_by_content([0])
    model = routed(**options).train()
    optimizer = Caught(model)
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **overrides,
    )
    try:
        examples = data(typed=trainer_class is TypedTrainer)
        trainer = trainer_class(
            model=model, args=arguments, train_dataset=examples, optimizers=(optimizer, None), **more
        )
        trainer.train()
    finally:
        torch.rand_like = original
    state = {key: value.detach().clone() for key, value in model.named_parameters() if not value.requires_grad}
    return {**optimizer.caught[-1], **{key: value for key, value in state.items() if "moe_adapter" in key}}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    results = {case: run(case, folder / case, 2, 1) for case in CASES}
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
