"""Checkpoints that are whole or not there: written beside their place, renamed when the last file is complete.

A checkpoint of step N is written to `.checkpoint-N.part` and becomes `checkpoint-N` by one rename, after which older
ones are rotated out. A process killed in between, or a full disk, leaves the previous checkpoints as they were and at
most a hidden folder, which the next save of that step replaces. Nobody, the stock Trainer included, takes it for a
checkpoint. The rename is atomic against a killed process; nothing is flushed to the disk for a loss of power, so
resuming checks each checkpoint as well (`guard.last_checkpoint`).

What a resume reads: `safetensors` for weights, JSON for the Trainer's state, and `torch.load(weights_only=True)` for
optimizer, scheduler and random state, which refuses code.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from moe_kit.errors import CheckpointError
from moe_kit.hf.adapter_files import WEIGHTS
from moe_kit.training.guard import guarded, incomplete, last_checkpoint


def atomic(base: type) -> type:
    """Make a trainer class whose checkpoints appear by a rename, and which resumes from whole ones only.

    Args:
        base: `transformers.Trainer` or a subclass.

    Returns:
        A subclass that also stops at a loss which is not finite (`guard.guarded`).
    """

    class Atomic(guarded(base)):
        _final: Path | None = None
        _part: Path | None = None

        def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            """Train; see `transformers.Trainer.train`.

            Args:
                resume_from_checkpoint: a folder, or True for the newest whole checkpoint of the output folder.
                *args: as for the stock Trainer.
                **kwargs: as for the stock Trainer.

            Raises:
                CheckpointError: if the folder is no whole checkpoint, or there is none.
                TrainingError: if the loss is not finite.
            """
            folder = self.args.output_dir
            if resume_from_checkpoint is True:
                found = last_checkpoint(folder)
                if found is None:
                    raise CheckpointError(f"{folder} holds no whole checkpoint to resume from: train without resuming.")
                resume_from_checkpoint = str(found)
            elif resume_from_checkpoint:
                reason = incomplete(Path(resume_from_checkpoint))
                if reason is not None:
                    good = last_checkpoint(Path(resume_from_checkpoint).parent)
                    raise CheckpointError(
                        f"{resume_from_checkpoint} is no whole checkpoint ({reason}): its writing was interrupted or it was "
                        f"copied in part. Last good checkpoint beside it: {good or 'none'}."
                    )
            return super().train(resume_from_checkpoint, *args, **kwargs)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            run_dir = Path(self._get_output_dir(trial=trial))
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._final, self._part = run_dir / name, run_dir / f".{name}.part"
            if self.args.should_save:
                shutil.rmtree(self._part, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            state = self.state
            if state.best_global_step and state.best_global_step == state.global_step:
                # the stock Trainer looks for the folder, which does not have its name yet
                state.best_model_checkpoint = str(self._final)
            # the last file that the stock Trainer writes, on the process that writes
            state.save_to_json = self._commit
            try:
                super()._save_checkpoint(model, trial)
            except Exception as error:
                shutil.rmtree(self._part, ignore_errors=True)
                if isinstance(error, CheckpointError):
                    raise
                # a full disk shows as OSError, RuntimeError or SafetensorError, by who writes
                raise CheckpointError(
                    f"cannot save the checkpoint of step {state.global_step}: {error}. Make room, then resume; last good "
                    f"checkpoint: {last_checkpoint(self.args.output_dir) or 'none'}."
                ) from error
            finally:
                del state.save_to_json
                self._final = None

        def _commit(self, path: str) -> None:
            """Write the Trainer's state, then give the folder its name."""
            type(self.state).save_to_json(self.state, self._redirected(path))
            if self._final.exists():
                # a resumed run saves a step again: the old one goes first, older ones stay
                shutil.rmtree(self._final)
            os.replace(self._part, self._final)

        def _load_best_model(self) -> None:
            # an adapter with a name of its own lies in a sub-folder, where the stock Trainer does not look: it would keep
            # the last weights and warn
            best, names = Path(self.state.best_model_checkpoint or ""), getattr(self.model, "active_adapters", None)
            own = [name for name in names if (best / name / WEIGHTS).is_file()] if isinstance(names, list) else []
            if not own:
                super()._load_best_model()
            for name in own:
                self.model.load_adapter(str(best / name), name)

        def _redirected(self, path: str) -> str:
            if self._final is None or path is None:
                return path
            inside = Path(path)
            if inside == self._final or self._final in inside.parents:
                return str(self._part / inside.relative_to(self._final))
            return path

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            super().save_model(self._redirected(output_dir), _internal_call)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(self._redirected(output_dir))

        def _save_scaler(self, output_dir: str) -> None:
            super()._save_scaler(self._redirected(output_dir))

        def _save_rng_state(self, output_dir: str) -> None:
            super()._save_rng_state(self._redirected(output_dir))
            # every process has written its part before the folder gets its name
            self.accelerator.wait_for_everyone()

    Atomic.__name__, Atomic.__qualname__ = base.__name__, base.__qualname__
    Atomic.__doc__ = f"{base.__name__} whose checkpoints are whole or not there."
    return Atomic
