"""Modelled bytes, FLOPs and time of the expert feed-forward on named model shapes: `python -m bench roofline`.

Nothing is measured here: `moe_kit_kernels.roofline` counts the kernels' own loops and walks an LRU cache of the L2's size in
their tile order; the rates of the devices are assumptions stated there.
"""

import argparse
import json

from moe_kit_kernels.roofline import A100, H100, block_costs, seconds

SHAPES = {
    "Qwen3-30B-A3B": {"E": 128, "K": 8, "D": 2048, "H": 768},
    "OLMoE-1B-7B": {"E": 64, "K": 8, "D": 2048, "H": 1024},
    "Mixtral-8x7B": {"E": 8, "K": 2, "D": 4096, "H": 14336},
}
"""Feed-forward blocks: experts, experts a token, width, expert width."""


def rows(tokens: int = 16384) -> list[dict]:
    """Return one row a model, device and design.

    Args:
        tokens: T.

    Returns:
        Rows with GB from HBM and L2, TFLOP and modelled microseconds of the forward in training.
    """
    result = []
    for model, shape in SHAPES.items():
        for device in (H100, A100):
            for design, kernels in block_costs(tokens, **shape, device=device).items():
                result.append(
                    {
                        "operator": "experts_mlp forward",
                        "model": model,
                        "tokens": tokens,
                        "device": device.name,
                        "design": design,
                        "hbm_gb": sum(kernel.hbm_bytes for kernel in kernels) / 1e9,
                        "l2_gb": sum(kernel.l2_bytes for kernel in kernels) / 1e9,
                        "tflop": sum(kernel.flops for kernel in kernels) / 1e12,
                        "modelled_us": seconds(kernels, device) * 1e6,
                    }
                )
    return result


def main(arguments: list[str] | None = None) -> None:
    """Print the table and write JSON rows if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", help="file to append JSON rows to")
    options = parser.parse_args(arguments)
    table = rows(options.tokens)
    for row in table:
        print(
            f"{row['model']:14s} {row['device']}  {row['design']:26s} HBM {row['hbm_gb']:8.2f} GB  L2 {row['l2_gb']:8.2f} GB"
            f"  {row['tflop']:6.2f} TFLOP  {row['modelled_us']:9.0f} us modelled"
        )
    if options.json:
        with open(options.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in table)


if __name__ == "__main__":
    main()
