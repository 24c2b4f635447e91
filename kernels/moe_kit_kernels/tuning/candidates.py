"""The few tile configurations that `warm_up` times for one kernel: a small grid, cut to what the GPU holds."""

import json

from moe_kit_kernels.tuning import Config, find, fit, shared_bytes

# (steps of the pipeline, warps)
_DEPTHS = ((3, 4), (4, 8), (2, 8), (2, 4))


def candidates(
    kernel: str,
    rows: int,
    itemsize: int,
    gated: bool,
    limit: int,
    *,
    default: Config | None = None,
    columns: int = 0,
) -> list[Config]:
    """Return the configurations to time: those of the grid that fit registers and shared memory.

    Args:
        kernel: Key of the tables.
        rows: Row tile height, where the configuration does not carry it.
        itemsize: Bytes an element; tiles over the contraction are shallow for 4, whose products run out of registers.
        gated: Two weight tiles a step.
        limit: Shared memory of the device, bytes.
        default: The default of a kernel that has no entry in `default.json`.
        columns: Columns of the tile, where the configuration does not carry BN.

    Returns:
        Distinct configurations, at least one; the default is the first where it fits.
    """
    # other tables' entries would make what is timed depend on what was timed before
    base = find(kernel, "default", limit, 1, 1, rows, gated, itemsize=itemsize, default=default)
    inner = next(name for name in ("BR", "BK", "BL") if name in base)
    grid = [base]
    # without the base product inside, the up kernel has no tile over the width in
    depths = (base[inner],) if kernel == "lora_up_dense" else (16, 32) if itemsize > 2 else (32, 64, 128)
    for depth in depths:
        for stages, warps in _DEPTHS:
            config = {**base, inner: depth, "num_stages": stages, "num_warps": warps}
            grid.append(config)
            if "BN" in base:
                grid.append({**config, "BN": base["BN"] * 2})
            if "BM" in base:
                grid.append({**config, "BM": 192 - base["BM"] if base["BM"] in (64, 128) else 64})

    def elements(config: Config) -> int:
        return config.get("BM", rows) * config.get("BN", columns) * (2 if gated else 1)

    # 512 columns of accumulator over 8 warps are what the registers hold, and a quarter of it next to plain units' operands
    held = 128 * 256 // (2 if itemsize > 2 else 1)
    small = [c for c in grid if elements(c) * 8 <= held * max(4, c["num_warps"])]
    fitting = [c for c in small if shared_bytes(c, rows, itemsize, gated, columns) <= limit]
    distinct = {json.dumps(c, sort_keys=True): c for c in fitting}
    return list(distinct.values()) or [fit(base, rows, itemsize, gated, limit, columns)]
