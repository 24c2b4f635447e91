"""Tile configurations of the matrix kernels: one JSON table a GPU, looked up by static sizes, never timed on the way.

A lookup takes the first that exists:

1. the environment variable `MOE_KIT_KERNELS_CONFIG`, which pins single values: `grouped_mm:BN=64,num_warps=4;grouped_gram:BR=32`;
2. an entry of the device's table (`<device name>.json` beside this file or in `MOE_KIT_KERNELS_TUNING`) with the same row
   height and element size, nearest in log2 of the two widths and the rank (distance 0 is the exact entry);
3. the entry of `sm_90.json` on that architecture and later ones, whose larger register tiles hold wider columns;
4. the default: that of the caller for the LoRA kernels (`lora_experts.tiles`), else the entry of `default.json`. Defaults
   compile without spills on every supported architecture.

The row height stands for the number of tokens: it is the bucket that P / E falls in (`route_plan.tile_height`), or the
height of a LoRA kernel's default tile, so a new token count is never a new key. Whatever is found is cut down until it fits
the device's shared memory.

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
LORA = ("lora_down_dense", "lora_up_dense", "lora_linear", "lora_up_sorted")
"""Kernels whose defaults are computed in `lora_experts.tiles`; `lora_linear` is the up product with the base inside."""
TABLES = "MOE_KIT_KERNELS_TUNING"
"""Environment variable naming a folder of further tables."""
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
"""Shared memory a block may use, bytes, by architecture."""

Config = dict[str, int]
# what warm_up found in this process: device name -> kernel -> entries
_measured: dict[str, dict[str, list[dict]]] = {}
# lookup's answers; the widths and ranks of a model are few
_answers: dict[tuple, Config] = {}


def shared_bytes(config: Config, rows: int, itemsize: int, gated: bool, columns: int = 0) -> int:
    """Estimate the shared memory of a software-pipelined product: `num_stages` copies of both operand tiles.

    Args:
        config: Tile sizes.
        rows: BM of a row kernel whose configuration does not carry it (a gram carries its own BO, BD, BR).
        itemsize: Bytes an element.
        gated: Two weight tiles instead of one.
        columns: Columns of the tile, where the configuration does not carry BN.

    Returns:
        Bytes.
    """
    if "BR" in config:
        tile = config["BR"] * (config["BO"] + config["BD"])
    else:
        tile = config[_inner(config)] * (config.get("BM", rows) + config.get("BN", columns) * (2 if gated else 1))
    return config["num_stages"] * tile * itemsize


def _inner(config: Config) -> str:
    """Name of the tile over the contraction: rows of a gram, ranks of a sorted up product, else the width."""
    return next(name for name in ("BR", "BK", "BL") if name in config)


def fit(config: Config, rows: int, itemsize: int, gated: bool, limit: int, columns: int = 0) -> Config:
    """Return `config` cut down until it fits `limit` bytes of shared memory: fewer stages first, then a shorter K tile."""
    config = dict(config)
    inner = _inner(config)
    while shared_bytes(config, rows, itemsize, gated, columns) > limit:
        if config["num_stages"] > 2:
            config["num_stages"] -= 1
        elif config[inner] > 16:
            config[inner] //= 2
        else:
            break
    return config


def full_precision(config: Config, rows: int, gated: bool) -> Config:
    """Return `config` for 4-byte operands.

    Exact float32 products run on the plain units: each thread takes its rows and columns of whole inner tiles into registers,
    so those tiles are 16 deep, and column tiles narrower.
    """
    cut = {**config, _inner(config): 16, "num_stages": min(3, config["num_stages"])}
    if "BN" in cut:
        cut["BN"] = min(32 if gated or rows <= 32 else 64, cut["BN"])
    return cut


def narrow(config: Config) -> Config:
    """Return `config` for operands whose rows are not 16-byte aligned.

    Such loads go element by element and keep one address each in registers; half the inner tile makes room for them.
    """
    inner = _inner(config)
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
    rank: int | None = None,
    default: Config | None = None,
    columns: int = 0,
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
        rank: L of a low-rank kernel.
        default: What holds where no table of the device has an entry; None means `default.json`.
        columns: Columns of the tile, where the configuration does not carry BN.

    Returns:
        Tile sizes, `num_warps` and `num_stages`; a copy.

    Raises:
        KernelError: The pinned configuration cannot be read or names an unknown kernel or value.
    """
    name, limit = _device(device)
    # a launch asks this every time, and finding it takes as long as the launch
    defaults = None if default is None else tuple(default.items())
    where = (os.environ.get(PIN, ""), os.environ.get(TABLES, ""))
    sizes = (width_in, width_out, rows, gated, itemsize, aligned, rank, columns)
    key = (kernel, name, limit, sizes, defaults, where)
    answer = _answers.get(key)
    if answer is None:
        config = find(
            kernel, name, limit, width_in, width_out, rows, gated, itemsize=itemsize, rank=rank, default=default
        )
        if not aligned:
            config = narrow(config)
        config.update(_pinned(kernel, config, where[0]))
        answer = _answers[key] = fit(config, rows, itemsize, gated, limit, columns)
    return dict(answer)


def forget() -> None:
    """Forget what was read and looked up: call it when a table on disk has changed."""
    _read.cache_clear()
    _answers.clear()


def find(
    kernel: str,
    device_name: str,
    limit: int,
    width_in: int,
    width_out: int,
    rows: int,
    gated: bool,
    *,
    itemsize: int = 2,
    rank: int | None = None,
    default: Config | None = None,
) -> Config:
    """Return the table's configuration, before pins and cuts.

    Args:
        kernel: Key of the tables.
        device_name: The GPU's name with underscores, or "default".
        limit: Shared memory of the device, bytes; tells the architecture's family.
        width_in: Contraction width.
        width_out: Output width.
        rows: Row tile height.
        gated: Two weight tiles a step.
        itemsize: Bytes an element of the operands.
        rank: L of a low-rank kernel.
        default: As in `lookup`.

    Returns:
        A copy of the entry.
    """
    measured = {} if device_name == "default" else _table(device_name)
    entries = [*_measured.get(device_name, {}).get(kernel, []), *measured.get(kernel, [])]
    # entries that do not say so were measured with 2-byte elements
    entries = [e for e in entries if e["rows"] == rows and e.get("gated", gated) == gated]
    entries = [e for e in entries if e.get("itemsize", 2) == itemsize]
    if entries:
        asked = {"width_in": width_in, "width_out": width_out, "rank": rank}

        def distance(entry: dict) -> float:
            return sum(abs(math.log2(entry[k] / size)) for k, size in asked.items() if size and entry.get(k))

        best = min(entries, key=distance)
    elif default is not None:
        return dict(default)
    else:
        family = _table("sm_90").get(kernel, []) if limit >= SHARED_LIMIT["sm_90"] else []
        best = next(entry for entry in [*family, *_table("default")[kernel]] if entry["rows"] == rows)
    keys = ("rows", "width_in", "width_out", "rank", "itemsize", "milliseconds", "gated")
    config = {key: value for key, value in best.items() if key not in keys}
    if entries and default is not None and set(config) != set(default):
        raise fail(
            "tuning",
            f"an entry of {kernel}",
            sorted(config),
            f"the values {sorted(default)}",
            f"Correct {device_name}.json",
        )
    # an entry measured for gated launches says so and is taken as it is
    if gated and kernel == "grouped_mm" and "gated" not in best:
        # two accumulators share the registers of one, and the epilogue needs some more
        config["BN"] = max(32, min(64, config["BN"] // 2))
    return full_precision(config, rows, gated) if itemsize > 2 and not entries else config


def _table(name: str) -> dict[str, list[dict]]:
    return _read(name, os.environ.get(TABLES, ""))


@lru_cache
def _read(name: str, more: str) -> dict[str, list[dict]]:
    folders = [Path(folder) for folder in [more] if folder] + [Path(__file__).parent]
    for folder in folders:
        path = folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
    return {}


def _pinned(kernel: str, config: Config, text: str) -> Config:
    parts = [part.partition(":") for part in text.split(";") if part.strip()]
    kernels = (*_table("default"), *LORA)
    for name, _, _ in parts:
        if name.strip() not in kernels:
            raise fail("tuning", f"the kernel in {PIN}", repr(name.strip()), f"one of {sorted(kernels)}", "Correct it")
    for name, _, values in parts:
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


def _gpu() -> torch.device | None:
    return torch.device("cuda") if torch.cuda.is_available() else None


def _device(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "default", SHARED_LIMIT["sm_90"]
    return _cuda_device(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _cuda_device(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    limit = getattr(properties, "shared_memory_per_block_optin", SHARED_LIMIT["sm_86"])
    return properties.name.replace(" ", "_"), limit


def warm_up(
    *,
    tokens: int,
    experts: int,
    top_k: int,
    width: int,
    hidden: int,
    rank: int | None = None,
    gated: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    json_path: str | Path | None = None,
) -> dict[str, list[dict]]:
    """Time candidate tiles for one layer's sizes and use the fastest from now on in this process.

    Takes some seconds; call it once before training so that no step pays for it.

    Args:
        tokens: Tokens a call; only the bucket of tokens * top_k / experts matters.
        experts: E.
        top_k: K.
        width: Model width D.
        hidden: Expert width H; with `rank`, the width out of the linear.
        rank: None times the block of full-size experts; else L of the LoRA kernels, on a dense base and on experts' own
            weights, both width -> hidden.
        gated: SwiGLU-like experts.
        dtype: Of activations and weights.
        json_path: Also write the table of this device there (merge it into a folder named by `MOE_KIT_KERNELS_TUNING`).

    Returns:
        Kernel -> entries measured for this device, with milliseconds.

    Raises:
        KernelError: There is no GPU: there is nothing to time, and the default table serves.
    """
    device = _gpu()
    if device is None:
        raise fail("warm_up", "the device", "the CPU only", "a CUDA device", "Skip the call: the defaults serve")
    from moe_kit_kernels.tuning import candidates, measure

    name, limit = _device(device)
    table = _measured.setdefault(name, {})
    pin, itemsize = os.environ.get(PIN), dtype.itemsize

    def best(kernel: str, rows: int, run: Callable[[], float], sizes: Config, gated: bool = False, **more: Any) -> None:
        timed = []
        for config in candidates.candidates(kernel, rows, itemsize, gated, limit, **more):
            os.environ[PIN] = f"{kernel}:" + ",".join(f"{k}={v}" for k, v in config.items())
            timed.append((run(), config))
        milliseconds, config = min(timed, key=lambda pair: pair[0])
        key = {"rows": rows, **sizes, "gated": gated, "itemsize": itemsize}
        # measured again, an entry takes the place of its predecessor
        others = [entry for entry in table.get(kernel, []) if any(entry.get(k) != v for k, v in key.items())]
        table[kernel] = [*others, {**key, "milliseconds": milliseconds, **config}]
        _answers.clear()

    try:
        if rank is None:
            measure.measure_block(best, tokens, experts, top_k, width, hidden, gated, dtype, device)
        else:
            measure.measure_lora(best, tokens, experts, top_k, rank, width, hidden, dtype, device)
    finally:
        os.environ.pop(PIN, None)
        if pin is not None:
            os.environ[PIN] = pin
    if json_path is not None:
        Path(json_path).write_text(json.dumps(table, indent=1))
    return table
