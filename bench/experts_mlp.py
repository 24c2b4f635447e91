"""`experts_mlp` on the CPU against transformers' expert implementations: eager, grouped_mm, batched_mm.

All sides get the same module (the weights of a Qwen3-MoE experts layer), tokens, ids and weights; the correctness gate
runs first. `batched_mm` copies the weights of every pair and takes part only where that copy stays under 1 GB.
"""

import argparse
import itertools
import json
import math
import platform
from collections.abc import Callable

import torch
from moe_kit_kernels import experts_mlp
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bench import paired

SHAPES = ((8, 1024, 2), (64, 256, 8))
"""(experts, expert width, experts a token)."""
WIDTH = 512
COPY_LIMIT_BYTES = 1e9


def _layer(experts: int, hidden: int) -> torch.nn.Module:
    config = Qwen3MoeConfig(hidden_size=WIDTH, moe_intermediate_size=hidden, num_experts=experts, hidden_act="silu")
    config._experts_implementation = "eager"
    layer = Qwen3MoeExperts(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    return layer


def _sides(layer: torch.nn.Module, tokens: int, top_k: int) -> dict[str, Callable]:
    def ours(x, ids, weights):
        return experts_mlp(x, layer.gate_up_proj, layer.down_proj, ids, weights)

    eager = type(layer).forward.__wrapped__
    sides = {
        "moe_kit": ours,
        "eager": lambda *a: eager(layer, *a),
        "grouped_mm": lambda *a: grouped_mm_experts_forward(layer, *a),
    }
    copied = tokens * top_k * sum(p[0].numel() * p.element_size() for p in layer.parameters())
    if copied < COPY_LIMIT_BYTES:
        sides["batched_mm"] = lambda *a: batched_mm_experts_forward(layer, *a)
    return sides


def _step(layer: torch.nn.Module, side: Callable, inputs: tuple, upstream: torch.Tensor, backward: bool) -> Callable:
    x, ids, weights = inputs

    def forward():
        with torch.no_grad():
            return side(x, ids, weights)

    def both():
        for tensor in (x, weights, *layer.parameters()):
            tensor.grad = None
        side(x, ids, weights).backward(upstream)

    return both if backward else forward


def rows(tokens: tuple[int, ...] = (1, 8, 128, 512), rounds: int = 15) -> list[dict]:
    """Measure every shape; one dict a (shape, tokens, direction) with medians, ratios and noise.

    Args:
        tokens: Token counts.
        rounds: Alternating rounds of each comparison.

    Returns:
        Rows with `best` (the fastest peer) and `speedup`: its time over ours, median of per-round ratios.
    """
    result = []
    for (experts, hidden, top_k), T, backward in itertools.product(SHAPES, tokens, (False, True)):
        torch.manual_seed(0)
        layer = _layer(experts, hidden)
        x = torch.randn(T, WIDTH, requires_grad=True)
        logits = torch.randn(T, experts)
        weights, ids = logits.softmax(-1).topk(top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).detach().requires_grad_()
        upstream = torch.randn(T, WIDTH)
        sides = _sides(layer, T, top_k)
        steps = {name: _step(layer, side, (x, ids, weights), upstream, backward) for name, side in sides.items()}
        _gate(layer, sides, (x, ids, weights), upstream)
        measured = paired(steps, rounds=rounds)
        best = min(measured.ratio, key=measured.ratio.__getitem__)
        result.append(
            {
                "operator": "experts_mlp",
                "experts": experts,
                "hidden": hidden,
                "top_k": top_k,
                "width": WIDTH,
                "tokens": T,
                "direction": "forward + backward" if backward else "forward",
                "median_ms": measured.median_ms,
                "ratio": measured.ratio,
                "best": best,
                "speedup": measured.ratio[best],
                "noise": measured.noise,
                "rounds": measured.rounds,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
            }
        )
    return result


def _gate(layer: torch.nn.Module, sides: dict[str, Callable], inputs: tuple, upstream: torch.Tensor) -> None:
    """Assert that all sides agree, outputs and gradients, before anything is timed."""
    expected = None
    for name, side in sides.items():
        for tensor in (inputs[0], inputs[2], *layer.parameters()):
            tensor.grad = None
        y = side(*inputs)
        y.backward(upstream)
        got = [y.detach(), inputs[0].grad, inputs[2].grad, *(p.grad for p in layer.parameters())]
        expected = expected or got
        for actual, want in zip(got, expected):
            error = (actual - want).norm() / want.norm().clamp_min(1e-12)
            assert error < 1e-5, f"{name} differs from the first side: {error:.1e}"


def geometric_mean(values: list[float]) -> float:
    """Return the geometric mean of positive values."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write the rows as JSON lines if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="file to append JSON rows to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = rows(tuple(options.tokens), options.rounds)
    for row in table:
        times = "  ".join(f"{name} {ms:.2f}" for name, ms in row["median_ms"].items())
        print(
            f"{row['experts']:3d} x {row['hidden']:4d} top-{row['top_k']}  T {row['tokens']:4d}  {row['direction']:18s}"
            f"  speedup {row['speedup']:.2f} over {row['best']:10s} noise {row['noise']:.2f}  ms: {times}"
        )
    for low, high in ((1, 8), (128, 512)):
        speedups = [row["speedup"] for row in table if low <= row["tokens"] <= high]
        if speedups:
            mean = geometric_mean(speedups)
            print(f"T {low} to {high}: geometric mean {mean:.2f}, lowest {min(speedups):.2f}")
    if options.json:
        with open(options.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in table)


if __name__ == "__main__":
    main()
