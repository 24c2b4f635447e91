"""Progress a person can read: one live line in a terminal, a plain line now and then in a log file.

The line shows the step, the loss of the last few steps, real (unpadded) tokens per second, and the time left at the current pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["StepReporter", "counting", "stepping"]

# a log file gets this many lines for one bar
_PLAIN_LINES = 10


class StepReporter:
    """Turns a trainer's steps into progress updates.

    Args:
        console: Where to write.
        total: Steps in all.
        label: What is being done.
        start: Steps done before this run (after a resume).
    """

    def __init__(self, console: Console, total: int, label: str, start: int = 0):
        self._console, self._total, self._label = console, total, label
        self._loss: float | None = None
        self._done = self._start = start
        self._tokens, self._began = 0, time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total, completed=start, note="")

    def __enter__(self) -> StepReporter:
        self._bar.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, *, loss: float | None = None, tokens: int = 0) -> None:
        """Report that `done` steps are finished.

        Args:
            done: Steps finished in all.
            loss: Mean loss since the last call that gave one, in nats a token; it stays in sight until the next.
            tokens: Tokens since the start of this run.
        """
        if loss is not None:
            self._loss = loss
        self._tokens = tokens
        seconds = max(time.perf_counter() - self._began, 1e-9)
        notes = [f"loss {self._loss:.3f}"] if self._loss is not None else []
        if tokens:
            notes.append(f"{tokens / seconds:.0f} tokens/s")
        before, self._done = self._done, done
        self._bar.update(self._task, completed=done, note="  ".join(notes))
        if not self._console.is_terminal and done > before:
            line = max(self._total // _PLAIN_LINES, 1)
            if done // line > before // line or done == self._total:
                left = (self._total - done) * seconds / max(done - self._start, 1)
                text = "  ".join([f"{self._label} {done}/{self._total}", *notes, f"{left:.0f} s left"])
                self._console.print(text, highlight=False)


@contextmanager
def counting(console: Console, total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Show progress over a known number of items.

    Args:
        console: Where to write.
        total: Items in all.
        label: What is being done.

    Yields:
        A function to call with the number of items just finished.
    """
    done = 0
    with StepReporter(console, total, label) as reporter:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            reporter.update(done)

        yield advance


def stepping(reporter: StepReporter, tokens: Callable[[], int]) -> Any:
    """Make a `TrainerCallback` that feeds a reporter.

    Args:
        reporter: Shows the progress.
        tokens: Returns the tokens seen in this run.

    Returns:
        The callback; it reads the loss from the trainer's logs.
    """
    from transformers import TrainerCallback

    class Stepping(TrainerCallback):
        """Forwards steps and logged losses."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reporter.update(state.global_step, tokens=tokens())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                reporter.update(state.global_step, loss=logs["loss"], tokens=tokens())

    return Stepping()
