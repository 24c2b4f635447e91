"""Ctrl-C while training: the step under way is finished and saved, then training stops; a second Ctrl-C stops at once.

Stopping in the middle of a step would lose every step since the last checkpoint. The checkpoint written here is one like
any other, so a resumed run ends like one that was never interrupted.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["interruptible"]


@contextmanager
def interruptible() -> Iterator[Any]:
    """Turn the first interruption from the keyboard inside this block into a wish to stop after the step.

    Python's own handler is put back at the end, and after the first interruption. Outside the main thread, or where a
    program has a handler of its own, nothing is changed.

    Yields:
        A `TrainerCallback` for the trainer; its `asked` tells whether the user wants to stop.
    """
    from transformers import TrainerCallback

    class Stopping(TrainerCallback):
        """Saves and stops at the end of a step, once asked to."""

        asked = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.asked:
                control.should_save = control.should_training_stop = True

    stopping = Stopping()
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stopping
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stopping.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step; once more stops at once", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
