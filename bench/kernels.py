"""The operators on one's own shapes: `python -m bench kernels --tokens 4096 --experts 64 --top-k 8 --d-in 2048 --d-out 1024`.

Runs on the GPU if there is one, else on the CPU. Checks first (every side against the reference, outputs and gradients),
then measures forward and backward, paired and alternating, against torch's grouped_mm, a masked GEMM pair and a loop.
transformers' expert backends are not measured here yet; scattermoe, Liger and SonicMoE are looked for and named in the
output, not measured.
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
from moe_kit_kernels import experts_mlp, lora_experts
from moe_kit_kernels.roofline import A100, H100
from torch import Tensor
from torch.nn import functional as F

OPERATORS = ("experts_mlp", "lora_experts")
OTHER_LIBRARIES = ("scattermoe", "liger_kernel", "sonicmoe")


def draw_ids(load: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """Return ids `[T, K]` of a load.

    Args:
        load: "uniform"; "zipf" (probability of expert i falls as 1 / (i + 1)^1.5); "one" (all tokens to the same
            experts); or a file with saved ids, `[T, K]` by `torch.save`.
        tokens: T.
        experts: E.
        top_k: K.

    Returns:
        int64 ids, K distinct experts a token.
    """
    if load == "uniform":
        return torch.rand(tokens, experts).topk(top_k).indices
    if load == "zipf":
        p_E = 1.0 / torch.arange(1, experts + 1).float() ** 1.5
        # the largest of log p + Gumbel noise draws without replacement
        return (p_E.log() - torch.empty(tokens, experts).exponential_().log()).topk(top_k).indices
    if load == "one":
        return torch.arange(top_k).expand(tokens, top_k).contiguous()
    return torch.load(load, weights_only=True)[:tokens].long()


def experts_sides(options: argparse.Namespace, ids: Tensor) -> tuple[dict[str, Callable], list[Tensor], float]:
    """Return the sides of `experts_mlp`, their differentiable inputs and the FLOPs of a forward."""
    T, E, D, H = options.tokens, options.experts, options.d_in, options.d_out
    dtype, device = getattr(torch, options.dtype), ids.device
    x = torch.randn(T, D, dtype=dtype, device=device)
    up = torch.randn(E, 2 * H, D, dtype=dtype, device=device) / D**0.5
    down = torch.randn(E, D, H, dtype=dtype, device=device) / H**0.5
    weights = torch.rand(ids.shape, device=device)

    def loop(x, up, down, weights):
        y = torch.zeros_like(x, dtype=torch.float32)
        for e in range(E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            gate, value = F.linear(x[token], up[e]).chunk(2, -1)
            part = F.linear(F.silu(gate) * value, down[e]) * weights[token, slot, None]
            y = y.index_add(0, token, part.float())
        return y.to(x.dtype)

    def grouped(x, up, down, weights):
        expert, order = ids.reshape(-1).sort(stable=True)
        ends = (
            torch.zeros(E, dtype=torch.int64, device=device).scatter_add_(0, expert, torch.ones_like(expert)).cumsum(0)
        )
        rows = x[order // ids.shape[1]]
        gate, value = F.grouped_mm(rows, up.transpose(1, 2), offs=ends.int()).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=ends.int())
        out = out * weights.reshape(-1)[order, None].to(out.dtype)
        return out[order.argsort()].view(T, ids.shape[1], D).sum(1)

    sides = {
        "moe_kit": lambda x, up, down, w: experts_mlp(x, up, down, ids, w),
        "torch grouped_mm": grouped,
        "loop": loop,
    }
    return sides, [x, up, down, weights], 6.0 * ids.numel() * D * H


def lora_sides(options: argparse.Namespace, ids: Tensor) -> tuple[dict[str, Callable], list[Tensor], float]:
    """Return the sides of `lora_experts`, their differentiable inputs and the FLOPs of a forward."""
    T, E, D, O, L = options.tokens, options.experts, options.d_in, options.d_out, options.rank
    dtype, device = getattr(torch, options.dtype), ids.device
    x = torch.randn(T, D, dtype=dtype, device=device)
    A = torch.randn(E, L, D, dtype=dtype, device=device) / D**0.5
    B = torch.randn(E, O, L, dtype=dtype, device=device) / L**0.5
    weights = torch.rand(ids.shape, device=device)

    def masked(x, A, B, weights):
        gates = torch.zeros(T, E, dtype=weights.dtype, device=device).scatter_add(1, ids, weights).to(x.dtype)
        h = F.linear(x, A.reshape(E * L, D)).view(T, E, L) * gates[..., None]
        return h.reshape(T, E * L) @ B.transpose(1, 2).reshape(E * L, O)

    def loop(x, A, B, weights):
        y = torch.zeros(T, O, dtype=torch.float32, device=device)
        for e in range(E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            part = F.linear(F.linear(x[token], A[e]), B[e]) * weights[token, slot, None]
            y = y.index_add(0, token, part.float())
        return y.to(x.dtype)

    sides = {"moe_kit": lambda x, A, B, w: lora_experts(x, A, B, ids, w), "masked GEMM pair": masked, "loop": loop}
    return sides, [x, A, B, weights], 2.0 * ids.numel() * L * (D + O)


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


def rows(operator: str, options: argparse.Namespace) -> list[dict]:
    """Check and measure one operator; one row a side and direction."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ids = draw_ids(options.load, options.tokens, options.experts, options.top_k).to(device)
    build = {"experts_mlp": experts_sides, "lora_experts": lora_sides}[operator]
    sides, inputs, flops = build(options, ids)
    check(sides, inputs, 1e-4 if options.dtype == "float32" else 3e-2)
    result = []
    for direction in ("forward", "forward + backward"):
        leaves = [t.detach().requires_grad_(direction != "forward") for t in inputs]

        def step(side, leaves=leaves, direction=direction):
            y = side(*leaves)
            if direction != "forward":
                torch.autograd.grad(y, leaves, torch.ones_like(y))

        times: dict[str, list[float]] = {name: [] for name in [*sides, "moe_kit again"]}
        for round_index in range(options.rounds + 2):
            for name, values in times.items():
                side = sides[name.removesuffix(" again")]
                milliseconds = timed(lambda side=side, step=step: step(side), device)
                # the first two rounds compile and warm up
                if round_index > 1:
                    values.append(milliseconds)
        for name, values in times.items():
            quantiles = statistics.quantiles(values, n=10)
            median = statistics.median(values)
            ratio = statistics.median(v / base for v, base in zip(values, times["moe_kit"]))
            work = flops * (1 if direction == "forward" else 3)
            result.append(
                {
                    "operator": operator,
                    "side": name,
                    "direction": direction,
                    "median_ms": median,
                    "p20_ms": quantiles[1],
                    "p80_ms": quantiles[7],
                    "time_over_moe_kit": ratio,
                    "tflops": work / median / 1e9,
                    "peak_mb": peak_memory(
                        lambda name=name, step=step: step(sides[name.removesuffix(" again")]), device
                    ),
                    "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    **{
                        k: getattr(options, k) for k in ("tokens", "experts", "top_k", "rank", "d_in", "d_out", "dtype")
                    },
                    "load": options.load,
                }
            )
    return result


def peak_memory(function: Callable[[], object], device: torch.device) -> float | None:
    """Return the peak of newly allocated device memory, MB; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print; compare with a baseline and write rows and a trace if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--d-in", type=int, default=512, help="width of x")
    parser.add_argument("--d-out", type=int, default=1024, help="expert width, or output width of lora_experts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None)
    parser.add_argument("--load", default="uniform", help="uniform, zipf, one, or a file of ids")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--baseline", help="rows of an earlier run; prints the ratio to it")
    parser.add_argument("--trace", help="file for a torch profiler trace of one step of moe_kit")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    missing = [name for name in OTHER_LIBRARIES if importlib.util.find_spec(name) is None]
    print(f"not importable here, not measured: {', '.join(missing) or 'none'}")
    table = [row for operator in options.operator for row in rows(operator, options)]
    baseline = json.loads(Path(options.baseline).read_text()) if options.baseline else []
    known = {(r["operator"], r["side"], r["direction"]): r["median_ms"] for r in baseline}
    for row in table:
        key = (row["operator"], row["side"], row["direction"])
        against = f"  {known[key] / row['median_ms']:.2f}x the baseline's speed" if key in known else ""
        peaks = [d for d in (H100, A100) if d.name in row["device"]]
        share = f"  {row['tflops'] * 1e12 / peaks[0].flops:.0%} of assumed peak" if peaks else ""
        print(
            f"{row['operator']:13s} {row['direction']:18s} {row['side']:18s} {row['median_ms']:9.3f} ms "
            f"({row['p20_ms']:.3f} to {row['p80_ms']:.3f})  {row['time_over_moe_kit']:5.2f}x moe_kit's time"
            f"  {row['tflops']:7.3f} TFLOPS{share}{against}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1) + "\n")
    if options.trace:
        trace(options)


def trace(options: argparse.Namespace) -> None:
    """Write a profiler trace of one forward and backward of the first operator."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = draw_ids(options.load, options.tokens, options.experts, options.top_k).to(device)
    build = {"experts_mlp": experts_sides, "lora_experts": lora_sides}[options.operator[0]]
    sides, inputs, _ = build(options, ids)
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.profiler.profile() as profile:
        sides["moe_kit"](*leaves).sum().backward()
    profile.export_chrome_trace(options.trace)
    print(f"trace written to {options.trace}; open it in a Chrome-trace viewer")


if __name__ == "__main__":
    main()
