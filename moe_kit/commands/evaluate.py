"""`moe-kit eval DIR [--key value ...]`: evaluate a saved adapter again, on as many held-out questions as wanted."""

from __future__ import annotations

from pathlib import Path

from moe_kit.commands.options import parse_recipe, quiet_libraries
from moe_kit.errors import CheckpointError

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Evaluate a saved adapter.

    Without options these are the held-out questions of the training run. With `--data.eval_examples 500`, or other
    tasks or files, questions that were trained on are recognised and passed over.

    Args:
        arguments: Words after `moe-kit eval`.

    Raises:
        CheckpointError: DIR holds no finished run.
    """
    recipe, _ = parse_recipe(arguments, command="eval", flags={})
    folder = Path(arguments[0])
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give an output folder of `moe-kit train`")
    quiet_libraries()
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from moe_kit.evaluation.likelihood import answer_likelihood
    from moe_kit.evaluation.scores import mean_score
    from moe_kit.training.data import held_out_examples, load_examples
    from moe_kit.training.models import matmul_precision
    from moe_kit.training.run import evaluate, load_run, training_examples

    console = Console(highlight=False, emoji=False)
    model, tokenizer, trained = load_run(folder)
    known = load_examples(trained.data, train_examples=training_examples(trained)).train
    sets = held_out_examples(recipe.data, known=known)
    with matmul_precision(recipe.model.matmul_precision):
        scores, _ = evaluate(model, tokenizer, sets, recipe, console, "held-out")
        likelihood = answer_likelihood(model, tokenizer, sets.held_out, recipe.data, batch_size=recipe.eval.batch_size)
    table = Table(title=f"{escape(str(folder))}: exact match, % ± standard error")
    for name in ("task", "questions", "exact match", "nats an answer", "nats a token"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, score in scores.items():
        nats = likelihood[task]
        table.add_row(
            escape(task),
            str(score.count),
            str(score),
            f"{nats.nats_per_answer:.3f} ± {nats.stderr:.3f}",
            f"{nats.nats_per_token:.3f}",
        )
    mean = mean_score(scores)
    table.add_section()
    table.add_row("mean", str(mean.count), str(mean), "", "")
    console.print(table)
