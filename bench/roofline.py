"""Modelled bytes, FLOPs and time of every operator on named model shapes: `python -m bench roofline`.

Nothing is measured here: `moe_kit_kernels.roofline` counts the kernels' own loops and walks an LRU cache of the L2's size in
their tile order; the rates of the devices are assumptions stated there.
"""

import argparse
import json
from collections.abc import Callable, Iterator

from moe_kit_kernels.roofline import (
    A100,
    H100,
    Cost,
    Device,
    compaction_designs,
    gate_designs,
    grouped_lora_designs,
    linear_designs,
    lora_designs,
    mlp_designs,
    seconds,
)

BLOCKS = {
    "Qwen3-30B-A3B": {"E": 128, "K": 8, "D": 2048, "H": 768},
    "OLMoE-1B-7B": {"E": 64, "K": 8, "D": 2048, "H": 1024},
    "Mixtral-8x7B": {"E": 8, "K": 2, "D": 4096, "H": 14336},
}
"""Feed-forward blocks: experts, experts a token, width, expert width."""
LINEARS = {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)}
"""Linears of a Llama-3-8B layer: width in, width out."""
BANKS = ((8, 8), (8, 16), (8, 64), (64, 16), (64, 64))
"""Experts and rank of the routed LoRA experts."""
OPERATORS = ("experts_mlp", "lora_experts", "lora_linear", "lora_grouped", "topk_gate", "token_gather")

Case = tuple[str, str, Callable[[Device, bool], dict[str, list[Cost]]]]


def cases(operators: tuple[str, ...], tokens: int, every_linear: bool) -> Iterator[Case]:
    """Yield (operator, shape, function of device and direction) of every row group.

    Args:
        operators: Names among `OPERATORS`.
        tokens: T.
        every_linear: All banks on all linears; else all banks on q, o and 8 x 16 on the others.
    """
    for model, shape in BLOCKS.items():
        if "experts_mlp" in operators:
            yield "experts_mlp", model, lambda d, b, s=shape: mlp_designs(tokens, **s, device=d, backward=b)
        if "lora_grouped" in operators:
            sizes = (shape["K"], shape["E"], 16, shape["D"], 2 * shape["H"])
            name = f"{model} gate and up, rank 16"
            yield "lora_grouped", name, lambda d, b, s=sizes: grouped_lora_designs(tokens, *s, device=d, backward=b)
        if "topk_gate" in operators:
            sizes = (shape["K"], shape["E"])
            name = f"{model} router, top-{shape['K']} of {shape['E']}"
            yield "topk_gate", name, lambda d, b, s=sizes: gate_designs(tokens, *s, device=d, backward=b)
    for name, (D, O) in LINEARS.items():
        for E, L in BANKS:
            if not every_linear and name != "q, o" and (E, L) != (8, 16):
                continue
            label = f"Llama-3-8B {name}, {E} x {L}"
            sizes = (2, E, L, D, O)
            if "lora_experts" in operators:
                yield "lora_experts", label, lambda d, b, s=sizes: lora_designs(tokens, *s, device=d, backward=b)
            if "lora_linear" in operators:
                yield "lora_linear", label, lambda d, b, s=sizes: linear_designs(tokens, *s, device=d, backward=b)
    if "token_gather" in operators:
        for kept in (0.5, 0.9):
            label = f"Llama-3-8B stream, {kept:.0%} kept"
            yield "token_gather", label, lambda d, b, k=kept: compaction_designs(tokens, k, 4096, device=d, backward=b)


def rows(
    tokens: int = 16384,
    operators: tuple[str, ...] = OPERATORS,
    devices: tuple[Device, ...] = (H100, A100),
    every_linear: bool = False,
) -> list[dict]:
    """Return one row an operator, shape, device, direction and design.

    Args:
        tokens: T.
        operators: Names among `OPERATORS`.
        devices: Modelled GPUs.
        every_linear: All banks on all linears.

    Returns:
        Rows with GB from HBM and L2, TFLOP, modelled microseconds, and both as multiples of the minimum's.
    """
    result = []
    for operator, shape, designs_of in cases(operators, tokens, every_linear):
        for device in devices:
            for backward in (False, True):
                designs = designs_of(device, backward)
                least = designs["minimum"]
                for design, kernels in designs.items():
                    hbm = sum(kernel.hbm_bytes for kernel in kernels)
                    modelled = seconds(kernels, device)
                    result.append(
                        {
                            "operator": operator,
                            "direction": "backward" if backward else "forward",
                            "model": shape,
                            "tokens": tokens,
                            "device": device.name,
                            "design": design,
                            "hbm_gb": hbm / 1e9,
                            "l2_gb": sum(kernel.l2_bytes for kernel in kernels) / 1e9,
                            "tflop": sum(kernel.flops for kernel in kernels) / 1e12,
                            "modelled_us": modelled * 1e6,
                            "bytes_over_minimum": hbm / sum(kernel.hbm_bytes for kernel in least),
                            "time_over_minimum": modelled / seconds(least, device),
                        }
                    )
    return result


def show(table: list[dict]) -> None:
    """Print rows, one heading an operator, direction, shape and device."""
    group = None
    for row in table:
        if group != (group := tuple(row[key] for key in ("operator", "direction", "model", "device"))):
            print(f"\n{row['operator']} {row['direction']}, {row['model']}, {row['tokens']} tokens, {row['device']}")
        print(
            f"  {row['design']:42s} HBM {row['hbm_gb']:8.2f} GB ({row['bytes_over_minimum']:5.2f}x)  L2 {row['l2_gb']:8.2f} GB"
            f"  {row['tflop']:6.2f} TFLOP  {row['modelled_us']:9.0f} us modelled ({row['time_over_minimum']:5.2f}x)",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Print the table and write JSON rows if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--device", nargs="+", choices=("H100", "A100"), default=["H100", "A100"])
    parser.add_argument("--every-linear", action="store_true", help="all banks on all linears of Llama-3-8B")
    parser.add_argument("--json", help="file to append JSON rows to")
    options = parser.parse_args(arguments)
    devices = tuple({"H100": H100, "A100": A100}[name] for name in options.device)
    table = []
    for operator in options.operator:
        # a table takes minutes: each operator is printed when it is counted
        found = rows(options.tokens, (operator,), devices, options.every_linear)
        show(found)
        table += found
    if options.json:
        with open(options.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in table)


if __name__ == "__main__":
    main()
