"""Looks at a saved adapter before anything is loaded from it: only whole safetensors files are read, never a pickle."""

from __future__ import annotations

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
