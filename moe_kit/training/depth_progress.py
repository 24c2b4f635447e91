"""Where a layer-router recipe stands, kept in its output folder, so that `--resume` ends as if nothing had happened.

    progress/state.json          phase, step, figures of the steps, results of finished phases, name of the tensors' file
    progress/state-<p>-<s>.safetensors   weights of the adapters, AdamW's moments, random state after step s of phase p
    progress/evaluation.jsonl    batches of the evaluation

The tensors are written under a new name and flushed before `state.json` is replaced by one that names them: a process
killed at any moment leaves a whole state. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_kit.depth import LayerRoutingConfig
from moe_kit.errors import CheckpointError
from moe_kit.hf.adapter_files import flush
from moe_kit.training.results import write_atomically

FOLDER = "progress"
_STATE = "state.json"
# fields of the router's configuration that phases change
_CHANGING = ("tau", "skip_layers", "skip_order", "budget")


class Progress:
    """Keeps the state of a run on disk and puts it back; a `moe_kit.depth.loop.Keeper`.

    Args:
        folder: the run's output folder.
        model: the model with its adapters.
        learned: names of the parameters and buffers that belong to adapters.
        config: configuration of its layer router.
        save_steps: steps between two states within a phase.
        resume: read what the folder holds; else start with an empty state.

    Attributes:
        phase: index of the phase under way.
        results: results of the finished phases.
        stopping: has `asked`, which says that the user wants to stop after the step; None = nobody can ask.

    Raises:
        CheckpointError: if the state in the folder cannot be read or is another model's.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        learned: Sequence[str],
        config: LayerRoutingConfig,
        save_steps: int,
        resume: bool = False,
    ) -> None:
        self.folder, self.config, self.save_steps = folder / FOLDER, config, save_steps
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.tensors = {name: named[name] for name in learned}
        self.phase, self.results, self.stopping = 0, list[dict[str, Any]](), None
        self._history: list[float] = []
        self._stored: dict[str, Tensor] = {}
        if resume and (self.folder / _STATE).is_file():
            self._read()
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def steps(self) -> int:
        """Steps of the present phase that are done and kept."""
        return len(self._history)

    @property
    def evaluation(self) -> Path:
        """JSONL file of evaluated batches."""
        return self.folder / "evaluation.jsonl"

    def _read(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / _STATE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            # a file of this folder, whatever the JSON says
            stored = load_file(str(self.folder / Path(state["tensors"]).name))
            self.phase, self.results, self._history = state["phase"], state["results"], state["history"]
            for name in _CHANGING:
                # a field that did not exist when the run began has its default
                setattr(self.config, name, state["config"].get(name, getattr(self.config, name)))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"the state in {path} cannot be read: {error}. Leave --resume out to start over."
            ) from error
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.items() if name.startswith("weight.")}
        wanted = {f"weight.{name}": tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if shapes != wanted:
            differing = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
            raise CheckpointError(
                f"the state in {path} is of another model or adapter: {len(differing)} tensors differ, first "
                f"{differing[0]}. Leave --resume out to start over."
            )
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(stored[f"weight.{name}"])
        self._stored = stored

    def begin(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """Put AdamW and the random state where the phase stopped; returns the figures of the steps done."""
        stored, self._stored = self._stored, {}
        for index, parameter in enumerate(_parameters(optimizer)):
            prefix = f"optimizer.{index}."
            moments = {name[len(prefix) :]: value for name, value in stored.items() if name.startswith(prefix)}
            if moments:
                # the count of steps stays on the CPU, where AdamW keeps it
                optimizer.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in moments.items()
                }
        if "random" in stored:
            torch.set_rng_state(stored["random"])
        if "random.cuda" in stored and torch.cuda.is_available():
            torch.cuda.set_rng_state(stored["random.cuda"])
        return list(self._history)

    def after(self, optimizer: torch.optim.Optimizer, history: Sequence[float]) -> None:
        """Note a step; keep the state every `save_steps` steps and when the user asks to stop.

        Raises:
            KeyboardInterrupt: if the user asked to stop; the step is kept, and the message says how to go on.
        """
        asked = self.stopping is not None and self.stopping.asked
        self._history = list(history)
        if asked or len(history) % self.save_steps == 0:
            self._write(optimizer)
        if asked:
            raise KeyboardInterrupt

    def end_phase(self, result: dict[str, Any]) -> None:
        """Keep the state after a phase; the next one starts from it."""
        self.results.append(result)
        self.phase, self._history = self.phase + 1, []
        self._write(None)

    def remove(self) -> None:
        """The run is complete: nothing is left to go on from."""
        shutil.rmtree(self.folder)

    def _write(self, optimizer: torch.optim.Optimizer | None) -> None:
        from safetensors.torch import save_file

        tensors = {f"weight.{name}": tensor for name, tensor in self.tensors.items()}
        for index, parameter in enumerate([] if optimizer is None else _parameters(optimizer)):
            for name, value in optimizer.state[parameter].items() if optimizer is not None else ():
                tensors[f"optimizer.{index}.{name}"] = value
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        name = f"state-{self.phase}-{self.steps}.safetensors"
        scratch = self.folder / (name + ".part")
        try:
            # shared memory is refused by the format, and what is copied cannot change while it is written
            copied = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
            save_file(copied, str(scratch))
            flush(scratch)
            os.replace(scratch, self.folder / name)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write {self.folder / name}: {error}. Make room, then --resume.") from error
        state = {
            "phase": self.phase,
            "history": self._history,
            "results": self.results,
            "config": {field: getattr(self.config, field) for field in _CHANGING},
            "tensors": name,
        }
        write_atomically(self.folder / _STATE, json.dumps(state) + "\n")
        for old in self.folder.glob("state-*.safetensors*"):
            if old.name != name:
                old.unlink()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
