"""Adapter files on disk: written whole or not at all, looked at before anything is loaded from them.

Writing: everything goes to a folder of its own first and is flushed; renames put it in place, and an older version
comes back if one of them fails. Reading: only whole safetensors files, never a pickle.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_kit.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def check_adapter_folder(folder: str | Path, stem: str) -> None:
    """Refuse an adapter folder whose weights are a pickle, cut off, or another method's.

    Args:
        folder: a local folder; anything else (a hub id) and a folder without weights are left to PEFT.
        stem: what the names of the method's weights contain, such as "moe_adapter_".

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        pickle = Path(folder) / PICKLE
        if pickle.is_file():
            raise CheckpointError(
                f"{pickle} is a pickle, which can run any code when it is read; expected {WEIGHTS}. Load it yourself if "
                "you trust it and save it again with model.save_pretrained(folder)."
            )
        return
    from safetensors import SafetensorError, safe_open

    try:
        # opening checks the header against the length of the file
        with safe_open(str(weights), framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{weights} cannot be read ({error}): it is cut off or no safetensors file. Copy it again, or use an older "
            "checkpoint."
        ) from error
    if not any(stem in name for name in names):
        raise CheckpointError(
            f"{weights} holds no weight named {stem}*, but {len(names)} others (first: {min(names, default='none')}): "
            "it belongs to another PEFT method than its adapter_config.json says."
        )


@contextmanager
def replacing(folder: str | Path, *, last: str) -> Iterator[Path]:
    """Write files into an empty folder, which take their places in `folder` when the block ends without an error.

    Whatever fails, in the block or after it, `folder` is as it was. A process that is killed while older files are
    being replaced (a few renames) leaves `folder` without `last`, never a mixture that looks whole; the older files
    are then in the hidden folder beside the new ones.

    Args:
        folder: made if it does not exist; other files in it stay.
        last: name of the file that says the rest is whole; it is taken away first and put in place last.

    Yields:
        The folder to write to.

    Raises:
        OSError: as the block or the disk raises it.
    """
    folder = Path(folder).resolve()
    # inside an existing folder: it may be a mount, or its parent read-only
    home = folder if folder.exists() else folder.parent
    home.mkdir(parents=True, exist_ok=True)
    part = home / f".{folder.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    new, old = part / "new", part / "old"
    try:
        new.mkdir(parents=True)
        old.mkdir()
        yield new
        flush(new)
        if folder.exists():
            _exchange(new, folder, old, last)
        else:
            os.replace(new, folder)
        _flush_one(folder)
        _flush_one(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or everything in a folder, is on the disk.

    Args:
        path: the file, or the folder: what it holds is flushed, then itself.

    Raises:
        OSError: as the disk raises it.
    """
    for inside in sorted(path.rglob("*")):
        _flush_one(inside)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, folder: Path, old: Path, last: str) -> None:
    """Rename each entry of `new` into `folder`, older ones into `old`; back again if one cannot be."""
    names = sorted(path.name for path in new.iterdir() if path.name != last)
    moves = [(folder / name, old / name) for name in [last, *names] if (folder / name).exists()]
    moves += [(new / name, folder / name) for name in [*names, last] if (new / name).exists()]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        # an interruption from the keyboard as well
        for source, target in reversed(done):
            os.replace(target, source)
        raise
