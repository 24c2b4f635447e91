"""What a run adds to any trainer: it stops at a loss that is not finite, says where, and resumes from what is whole.

`guarded(TrainerClass)` returns a subclass that takes the examples' ids out of each batch before the model sees it. When
a loss is NaN or infinite it raises before the optimizer moves, with the step, the ids and the last good checkpoint.
This reads one number a micro-batch back from the device.

`last_checkpoint(folder)` passes over checkpoints whose writing was interrupted. `trainer_state.json` is the last file
the Trainer writes, so a checkpoint is whole when that file parses and the weights' header is complete.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from moe_kit.errors import CheckpointError, TrainingError

__all__ = ["TrainingError", "guarded", "incomplete", "last_checkpoint"]

logger = logging.getLogger(__name__)


@functools.cache
def guarded(base: type) -> type:
    """Make a trainer class whose runs stop at the first loss that is not finite.

    Args:
        base: `transformers.Trainer` or a subclass; one that is guarded already is returned as it is.

    Returns:
        A subclass of the same name. Its attribute `tokens_seen` counts real (unpadded) tokens.
    """

    if hasattr(base, "tokens_seen"):
        return base

    class Guarded(base):
        tokens_seen = 0

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            ids = inputs.pop("example_ids", None)
            mask = inputs.get("attention_mask")
            if mask is not None:
                self.tokens_seen += int(mask.sum())
            elif "input_ids" in inputs:
                # embeddings, pixels or sound in their place are not counted
                self.tokens_seen += inputs["input_ids"].numel()
            loss = super().training_step(model, inputs, *args, **kwargs)
            if not loss.isfinite().all():
                good = last_checkpoint(self.args.output_dir)
                raise TrainingError(
                    f"the loss is {float(loss.float().sum())} at step {self.state.global_step + 1}; batch: {ids}."
                    f" Last good checkpoint: {good or 'none'}."
                    " Look at these examples or lower the learning rate, then resume from it."
                )
            return loss

        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
            # evaluation inside the trainer comes this way only
            return super()._prepare_inputs({key: value for key, value in inputs.items() if key != "example_ids"})

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super()._save_checkpoint(*args, **kwargs)
            except OSError as error:
                raise CheckpointError(
                    f"cannot save the checkpoint of step {self.state.global_step}: {error}. Make room, then run again"
                    f" with --resume; last good checkpoint: {last_checkpoint(self.args.output_dir) or 'none'}."
                ) from error

    Guarded.__name__, Guarded.__qualname__ = base.__name__, base.__qualname__
    Guarded.__doc__ = f"{base.__name__} that stops at a loss which is not finite."
    return Guarded


def last_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest checkpoint that was written to its end.

    Args:
        folder: The trainer's output folder, with `checkpoint-<step>` folders.

    Returns:
        Its path, or None. Incomplete checkpoints are named in the log and passed over.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name)):
            found.append((int(match[1]), path))
    for _, path in sorted(found, reverse=True):
        reason = incomplete(path)
        if reason is None:
            return path
        logger.warning("%s is incomplete (%s): passed over", path, reason)
    return None


def incomplete(path: Path) -> str | None:
    """Say why a checkpoint cannot be resumed from.

    Args:
        path: A checkpoint's folder.

    Returns:
        The reason, or None if it is whole.
    """
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json: {error}"
    # adapters with a name of their own lie in sub-folders
    weights = sorted(path.rglob("*.safetensors"))
    if not weights:
        return "no weights"
    from safetensors import SafetensorError, safe_open

    for file in weights:
        try:
            # opening checks the header against the file's length
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name}: {error}"
    for file in sorted([*path.glob("*.pt"), *path.glob("*.pth")]):
        # torch writes zip archives, whose table stands at the end
        if not zipfile.is_zipfile(file):
            return f"{file.name}: cut off"
    return None
