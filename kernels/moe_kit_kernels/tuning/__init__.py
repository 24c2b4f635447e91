"""Tile configurations of the grouped kernels: one JSON table a GPU, looked up by static sizes, never timed on the way.

A lookup takes the first that exists:

1. the environment variable `MOE_KIT_KERNELS_CONFIG`, which pins single values: `grouped_mm:BN=64,num_warps=4;grouped_gram:BR=32`;
2. an entry of the device's table (`<device name>.json` beside this file or in `MOE_KIT_KERNELS_TUNING`) with the same row
   height, nearest in log2 of the two widths (distance 0 is the exact entry);
3. the entry of `sm_90.json` on that architecture and later ones, whose larger register tiles hold wider columns;
4. the entry of `default.json`, whose configurations compile without spills on every supported architecture.

The row height stands for the number of tokens: it is the bucket that P / E falls in (`route_plan.tile_height`), so a
new token count is never a new key. Whatever is found is cut down until it fits the device's shared memory.

`warm_up` times candidates on the GPU at hand, before training and only when called, and can write the table.
"""

import json
import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moe_kit_kernels.common.checks import fail

PIN = "MOE_KIT_KERNELS_CONFIG"
"""Environment variable that pins configuration values."""
TABLES = "MOE_KIT_KERNELS_TUNING"
"""Environment variable naming a folder of further tables."""
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
"""Shared memory a block may use, bytes, by architecture."""

Config = dict[str, int]
# what warm_up found in this process: device name -> kernel -> entries
_measured: dict[str, dict[str, list[dict]]] = {}


def shared_bytes(config: Config, rows: int, itemsize: int, gated: bool) -> int:
    """Estimate the shared memory of a software-pipelined product: `num_stages` copies of both operand tiles.

    Args:
        config: Tile sizes.
        rows: BM of a row kernel (a gram carries its own BO, BD, BR).
        itemsize: Bytes an element.
        gated: Two weight tiles instead of one.

    Returns:
        Bytes.
    """
    if "BR" in config:
        tile = config["BR"] * (config["BO"] + config["BD"])
    else:
        tile = config["BK"] * (rows + config["BN"] * (2 if gated else 1))
    return config["num_stages"] * tile * itemsize


def fit(config: Config, rows: int, itemsize: int, gated: bool, limit: int) -> Config:
    """Return `config` cut down until it fits `limit` bytes of shared memory: fewer stages first, then a shorter K tile."""
    config = dict(config)
    inner = "BR" if "BR" in config else "BK"
    while shared_bytes(config, rows, itemsize, gated) > limit:
        if config["num_stages"] > 2:
            config["num_stages"] -= 1
        elif config[inner] > 16:
            config[inner] //= 2
        else:
            break
    return config


def narrow(config: Config) -> Config:
    """Return `config` for operands whose rows are not 16-byte aligned.

    Such loads go element by element and keep one address each in registers; half the inner tile makes room for them.
    """
    inner = "BR" if "BR" in config else "BK"
    narrowed = {**config, inner: min(32, config[inner]), "num_stages": 1}
    for outer in {"BO", "BD", "BN"} & set(config):
        narrowed[outer] = min(32 if outer == "BN" else 64, config[outer])
    return narrowed


def lookup(
    kernel: str,
    device: torch.device,
    *,
    width_in: int,
    width_out: int,
    rows: int,
    gated: bool,
    itemsize: int = 2,
    aligned: bool = True,
) -> Config:
    """Return the tile configuration for one launch.

    Args:
        kernel: Key of the tables.
        device: Where it will run; the CPU stands for the interpreter.
        width_in: Contraction width.
        width_out: Output width.
        rows: Row tile height.
        gated: Two weight tiles a step.
        itemsize: Bytes an element of the operands.
        aligned: Every row of every operand starts at a multiple of 16 bytes.

    Returns:
        Tile sizes, `num_warps` and `num_stages`; a copy.

    Raises:
        KernelError: The pinned configuration cannot be read or names an unknown value.
    """
    name, limit = _device(device)
    config = find(kernel, name, limit, width_in, width_out, rows, gated)
    if not aligned:
        config = narrow(config)
    config.update(_pinned(kernel, config, os.environ.get(PIN, "")))
    return fit(config, rows, itemsize, gated, limit)


def find(kernel: str, device_name: str, limit: int, width_in: int, width_out: int, rows: int, gated: bool) -> Config:
    """Return the table's configuration, before pins and cuts.

    Args:
        kernel: Key of the tables.
        device_name: The GPU's name with underscores, or "default".
        limit: Shared memory of the device, bytes; tells the architecture's family.
        width_in: Contraction width.
        width_out: Output width.
        rows: Row tile height.
        gated: Two weight tiles a step.

    Returns:
        A copy of the entry.
    """
    measured = {} if device_name == "default" else _table(device_name)
    entries = [*_measured.get(device_name, {}).get(kernel, []), *measured.get(kernel, [])]
    entries = [entry for entry in entries if entry["rows"] == rows and entry.get("gated", gated) == gated]
    if entries:

        def distance(entry: dict) -> float:
            return abs(math.log2(entry["width_in"] / width_in)) + abs(math.log2(entry["width_out"] / width_out))

        best = min(entries, key=distance)
    else:
        family = _table("sm_90").get(kernel, []) if limit >= SHARED_LIMIT["sm_90"] else []
        best = next(entry for entry in [*family, *_table("default")[kernel]] if entry["rows"] == rows)
    keys = ("rows", "width_in", "width_out", "milliseconds", "gated")
    config = {key: value for key, value in best.items() if key not in keys}
    # an entry measured for gated launches says so and is taken as it is
    if gated and kernel == "grouped_mm" and "gated" not in best:
        # two accumulators share the registers of one, and the epilogue needs some more
        config["BN"] = max(32, min(64, config["BN"] // 2))
    return config


@lru_cache
def _table(name: str) -> dict[str, list[dict]]:
    folders = [Path(folder) for folder in [os.environ.get(TABLES, "")] if folder] + [Path(__file__).parent]
    for folder in folders:
        path = folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
    return {}


def _pinned(kernel: str, config: Config, text: str) -> Config:
    for part in filter(None, text.split(";")):
        name, _, values = part.partition(":")
        if name.strip() != kernel:
            continue
        try:
            pinned = {key.strip(): int(value) for key, value in (pair.split("=") for pair in values.split(","))}
        except ValueError:
            raise fail(
                "tuning", f"environment variable {PIN}", repr(text), "kernel:KEY=INT,KEY=INT;...", "Correct it"
            ) from None
        unknown = sorted(set(pinned) - set(config))
        if unknown:
            raise fail("tuning", f"{PIN} for {kernel}", unknown, f"keys among {sorted(config)}", "Correct it")
        return pinned
    return {}


def _device(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "default", SHARED_LIMIT["sm_90"]
    return _cuda_device(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _cuda_device(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    limit = getattr(properties, "shared_memory_per_block_optin", SHARED_LIMIT["sm_86"])
    return properties.name.replace(" ", "_"), limit


def candidates(kernel: str, rows: int, itemsize: int, gated: bool, limit: int) -> list[Config]:
    """Return the few configurations that `warm_up` times: those of the grid that fit shared memory.

    Args:
        kernel: Key of the tables.
        rows: Row tile height.
        itemsize: Bytes an element.
        gated: Two weight tiles a step.
        limit: Shared memory of the device, bytes.

    Returns:
        Distinct configurations, at least one.
    """
    base = find(kernel, "default", limit, 1, 1, rows, False)
    grid = [base]
    inner = "BR" if "BR" in base else "BK"
    for step, stages, warps in ((32, 3, 4), (32, 4, 8), (64, 2, 8), (64, 3, 4), (64, 4, 8), (128, 2, 8)):
        grid.append({**base, inner: step, "num_stages": stages, "num_warps": warps})
        if "BN" in base:
            grid.append({**base, inner: step, "num_stages": stages, "num_warps": warps, "BN": base["BN"] * 2})
    # 512 columns of accumulator over 8 warps are what the registers hold
    small = [c for c in grid if rows * c.get("BN", 0) <= 128 * 256 // (2 if gated else 1)]
    fitting = [c for c in small if shared_bytes(c, rows, itemsize, gated) <= limit]
    distinct = {json.dumps(c, sort_keys=True): c for c in fitting}
    return list(distinct.values()) or [fit(base, rows, itemsize, gated, limit)]


def warm_up(
    *,
    tokens: int,
    experts: int,
    top_k: int,
    width: int,
    hidden: int,
    gated: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    json_path: str | Path | None = None,
) -> dict[str, list[dict]]:
    """Time candidate tiles of the expert kernels for one block's sizes and use the fastest from now on in this process.

    Takes some seconds; call it once before training so that no step pays for it.

    Args:
        tokens: Tokens a call; only the bucket of tokens * top_k / experts matters.
        experts: E.
        top_k: K.
        width: Model width D.
        hidden: Expert width H.
        gated: SwiGLU-like experts.
        dtype: Of activations and weights.
        json_path: Also write the table of this device there (merge it into a folder named by `MOE_KIT_KERNELS_TUNING`).

    Returns:
        Kernel -> entries measured for this device, with milliseconds.

    Raises:
        KernelError: There is no GPU: there is nothing to time, and the default table serves.
    """
    if not torch.cuda.is_available():
        raise fail("warm_up", "the device", "the CPU only", "a CUDA device", "Skip the call: the defaults serve")
    from moe_kit_kernels.tuning.measure import measure_block

    name, limit = _device(torch.device("cuda"))
    table = _measured.setdefault(name, {})
    pin = os.environ.get(PIN)

    def best(kernel: str, rows: int, run: Callable[[], Any], sizes: tuple[int, int], is_gated: bool) -> None:
        itemsize = torch.empty(0, dtype=dtype).element_size()
        timed = []
        for config in candidates(kernel, rows, itemsize, is_gated, limit):
            os.environ[PIN] = f"{kernel}:" + ",".join(f"{k}={v}" for k, v in config.items())
            timed.append((run(), config))
        milliseconds, config = min(timed, key=lambda pair: pair[0])
        entry = {"rows": rows, "width_in": sizes[0], "width_out": sizes[1], "milliseconds": milliseconds, **config}
        entry["gated"] = is_gated
        table.setdefault(kernel, []).append(entry)

    try:
        measure_block(best, tokens, experts, top_k, width, hidden, gated, dtype)
    finally:
        os.environ.pop(PIN, None)
        if pin is not None:
            os.environ[PIN] = pin
    if json_path is not None:
        Path(json_path).write_text(json.dumps(table, indent=1))
    return table
