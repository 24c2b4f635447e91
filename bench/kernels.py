"""The operators on one's own shapes: `python -m bench kernels --tokens 4096 --experts 64 --top-k 8 --d-in 2048 --d-out 1024`.

Runs on the GPU if there is one, else on the CPU. Checks first (outputs and all gradients of every side against a loop over
experts), then measures forward and forward + backward, alternating, against torch's grouped_mm, transformers' expert
implementations (eager, grouped_mm, batched_mm), masked GEMMs, the loop, and scattermoe, Liger and SonicMoE where they can be
imported and run (a line says which were left out and why). Any other implementation joins with `--peer
operator=module:function`.

A row holds quantiles, TFLOPS of useful work, GB/s of the bytes that must move, the share of the roofline that this machine
reached in a large GEMM and a large copy, and the peak of new memory. `--baseline FILE` compares with the rows of an earlier
run, `--plot FILE` draws them, `--trace FILE` writes a profiler trace of one step of ours.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from moe_kit_kernels import KernelError
from torch import Tensor

from bench import turns
from bench._kernel_sides import BUILD, Sides, draw_ids

DIRECTIONS = ("forward", "forward + backward")


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one call, the device's work included."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return what this machine reaches: FLOP/s of a large square GEMM, byte/s of a large copy; the best of five."""
    size, elements = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(elements, device=device).to(dtype)
    target = torch.empty_like(source)
    a @ b
    target.copy_(source)
    product = min(timed(lambda: a @ b, device) for _ in range(5)) / 1e3
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(5)) / 1e3
    return 2.0 * size**3 / product, 2.0 * elements * source.element_size() / copy


def check(sides: dict[str, Callable], inputs: list[Tensor], bound: float) -> None:
    """Assert that every side's output and gradients equal the last side's (the loop)."""
    results = {}
    for name, side in sides.items():
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = side(*leaves)
        y.float().square().mean().backward()
        results[name] = [y.detach(), *(leaf.grad for leaf in leaves)]
    expected = results["loop"]
    for name, tensors in results.items():
        for index, (actual, want) in enumerate(zip(tensors, expected)):
            error = float((actual.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
            assert error < bound, f"{name}: tensor {index} differs from the loop by {error:.1e}, allowed {bound:.0e}"


def measure(sides: Sides, direction: str, device: torch.device, rounds: int) -> tuple[dict[str, list[float]], Callable]:
    """Time every side in turn, `rounds` times; the first side also runs a second time a round, as the noise.

    Args:
        sides: The comparison.
        direction: "forward" or "forward + backward".
        device: Where it runs.
        rounds: Alternating rounds.

    Returns:
        Name -> milliseconds of each round, and the function that runs one step of a named side.
    """
    leaves = [t.detach().requires_grad_(direction != "forward") for t in sides.inputs]

    def step(name: str) -> None:
        y = sides.functions[name.removesuffix(" again")](*leaves)
        if direction != "forward":
            torch.autograd.grad(y, leaves, torch.ones_like(y))

    times: dict[str, list[float]] = {name: [] for name in [*sides.functions, "moe_kit again"]}
    for index, order in enumerate(turns(list(times), rounds + 2)):
        for name in order:
            milliseconds = timed(lambda name=name: step(name), device)
            # the first two rounds compile and warm up
            if index > 1:
                times[name].append(milliseconds)
    return times, step


def rows(operator: str, options: argparse.Namespace) -> list[dict]:
    """Check and measure one operator; one row a side and direction."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ids = draw_ids(options.load, options.tokens, options.experts, options.top_k).to(device)
    sides = BUILD[operator](options, ids)
    if sides.left_out:
        print(f"{operator}: left out: " + "; ".join(f"{name}, {why}" for name, why in sides.left_out.items()))
    check(sides.functions, sides.inputs, 1e-4 if options.dtype == "float32" else 3e-2)
    peak, bandwidth = rates(device, getattr(torch, options.dtype))
    result = []
    for direction in DIRECTIONS:
        both = direction != "forward"
        work = sides.flops * (3 if both else 1)
        moved = sides.forward_bytes + (sides.backward_bytes if both else 0)
        times, step = measure(sides, direction, device, options.rounds)
        for name, values in times.items():
            quantiles, median = statistics.quantiles(values, n=10), statistics.median(values)
            result.append(
                {
                    "operator": operator,
                    "side": name,
                    "direction": direction,
                    "median_ms": median,
                    "p20_ms": quantiles[1],
                    "p80_ms": quantiles[7],
                    "time_over_moe_kit": statistics.median(v / base for v, base in zip(values, times["moe_kit"])),
                    "tflops": work / median / 1e9,
                    "gb_per_s": moved / median / 1e6,
                    "roofline_share": max(work / peak, moved / bandwidth) * 1e3 / median,
                    "peak_mb": peak_memory(lambda name=name, step=step: step(name), device),
                    "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
                    "device_tflops": peak / 1e12,
                    "device_gb_per_s": bandwidth / 1e9,
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "rounds": options.rounds,
                    **{k: getattr(options, k) for k in SHAPE},
                }
            )
    return result


SHAPE = ("tokens", "experts", "top_k", "rank", "d_in", "d_out", "dtype", "load")
"""Options that name a shape."""


def peak_memory(function: Callable[[], object], device: torch.device) -> float:
    """Return the peak of newly allocated memory, MB: the allocator's on a GPU, the profiler's record on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def plot(table: list[dict], path: str) -> None:
    """Draw the medians with their 20 % and 80 % quantiles, one panel an operator and direction.

    Args:
        table: Rows of one run.
        path: File to write; its ending names the format.

    Raises:
        KernelError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise KernelError("bench kernels: --plot needs matplotlib, which is not installed. pip install matplotlib.")
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["operator"], row["direction"]) for row in table))
    figure = Figure(figsize=(8, 0.6 + 2.4 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
        shown = [r for r in table if (r["operator"], r["direction"]) == panel and not r["side"].endswith(" again")]
        medians = [row["median_ms"] for row in shown]
        spread = [[r["median_ms"] - r["p20_ms"] for r in shown], [r["p80_ms"] - r["median_ms"] for r in shown]]
        names = [row["side"] for row in shown]
        axes.barh(names, medians, xerr=spread, color=["tab:orange" if n == "moe_kit" else "tab:gray" for n in names])
        axes.invert_yaxis()
        axes.set_title(f"{panel[0]}, {panel[1]}", fontsize=10)
        axes.set_xlabel("milliseconds")
    first = table[0]
    figure.suptitle(", ".join(f"{key} {first[key]}" for key in ("device", *SHAPE)), fontsize=8)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print; compare with a baseline and write rows, a plot and a trace if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", nargs="+", choices=tuple(BUILD), default=list(BUILD))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--d-in", type=int, default=512, help="width of x")
    parser.add_argument("--d-out", type=int, default=1024, help="expert width, or output width of lora_experts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None)
    parser.add_argument("--load", default="uniform", help="uniform, zipf, one, or a file of ids")
    parser.add_argument("--rounds", type=int, default=15, help="at least 2")
    parser.add_argument(
        "--peer", action="append", default=[], help="operator=module:function, another side; repeatable"
    )
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--baseline", help="rows of an earlier run; prints the ratio to it")
    parser.add_argument("--plot", help="file for a picture of the medians (needs matplotlib)")
    parser.add_argument("--trace", help="file for a torch profiler trace of one step of moe_kit")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        raise KernelError(f"bench kernels: --rounds got {options.rounds}; expected at least 2. Quantiles need two.")
    options.dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    table = [row for operator in options.operator for row in rows(operator, options)]
    known = _known(options.baseline)
    for row in table:
        before = known.get(_key(row))
        against = f"  {before / row['median_ms']:.2f}x the baseline's speed" if before else ""
        print(
            f"{row['operator']:12s} {row['direction']:18s} {row['side']:24s} {row['median_ms']:9.3f} ms "
            f"({row['p20_ms']:.3f} to {row['p80_ms']:.3f})  {row['time_over_moe_kit']:5.2f}x moe_kit's time"
            f"  {row['tflops']:7.3f} TFLOPS  {row['gb_per_s']:7.1f} GB/s  {row['roofline_share']:4.0%} of the roofline"
            f"  {row['peak_mb']:8.1f} MB{against}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1) + "\n")
    if options.plot:
        plot(table, options.plot)
    if options.trace:
        trace(options)


def _key(row: dict) -> tuple:
    return tuple(row[key] for key in ("operator", "side", "direction", "device", *SHAPE))


def _known(path: str | None) -> dict[tuple, float]:
    """Medians of an earlier run by side and shape; rows of other shapes or devices do not compare."""
    return {_key(row): row["median_ms"] for row in json.loads(Path(path).read_text())} if path else {}


def trace(options: argparse.Namespace) -> None:
    """Write a profiler trace of one forward and backward of the first operator."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = draw_ids(options.load, options.tokens, options.experts, options.top_k).to(device)
    sides = BUILD[options.operator[0]](options, ids)
    leaves = [t.detach().requires_grad_() for t in sides.inputs]
    with torch.profiler.profile() as profile:
        sides.functions["moe_kit"](*leaves).sum().backward()
    profile.export_chrome_trace(options.trace)
    print(f"trace written to {options.trace}; open it in a Chrome-trace viewer")


if __name__ == "__main__":
    main()
