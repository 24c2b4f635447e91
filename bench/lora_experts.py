"""Routed LoRA experts on the CPU against what one would write otherwise: `python -m bench lora_experts`.

Two tables, both sides of a ratio measured in one process, one call after the other, `rounds` times; a ratio is the
median of the rounds' ratios (time of the peer over ours, above 1 means we are faster). One side is also measured against
itself: that ratio's distance from 1 is the noise.

1. `operator`: one `lora_experts` call against the peers of the same mathematics: a loop over experts, a masked GEMM pair
   and `F.grouped_mm` on sorted pairs, all three by plain autograd.
2. `block`: all linears of one decoder block of SmolLM2-135M's widths with routed adapters (8 experts of rank 8, top-2,
   one plan and one gate per shared input), against PEFT's LoRA of rank 16 and 64; forward and backward. Attention, norms
   and the head are left out, so the ratio of a whole training step is closer to 1.

Legend: T tokens, K active experts, E experts, D width in, O width out, L rank.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from moe_kit_kernels import lora_experts, route_plan
from moe_kit_kernels.lora_linear import lora_linear, lora_linear_group
from torch import Tensor, nn

from bench import turns

Side = Callable[[], object]


def alternate(sides: dict[str, Side], rounds: int, floor_s: float = 0.002) -> dict[str, list[float]]:
    """Time all sides in turn, `rounds` times, in an order that changes each round; seconds a call."""
    calls = {}
    for name, side in sides.items():
        side()
        start = time.perf_counter()
        side()
        calls[name] = max(1, int(floor_s / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for order in turns(names, rounds):
        for name in order:
            start = time.perf_counter()
            for _ in range(calls[name]):
                sides[name]()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def ratio(times: dict[str, list[float]], peer: str, ours: str) -> float:
    """Median over rounds of peer's time over ours."""
    return statistics.median(p / o for p, o in zip(times[peer], times[ours], strict=True))


def loop(x_TD: Tensor, A_ELD: Tensor, B_EOL: Tensor, ids_TK: Tensor, weights_TK: Tensor, base_TO: Tensor) -> Tensor:
    """The usual loop: each expert picks its tokens."""
    y_TO = base_TO
    for e in range(A_ELD.shape[0]):
        token, slot = (ids_TK == e).nonzero(as_tuple=True)
        if token.numel():
            h = x_TD[token] @ A_ELD[e].T @ B_EOL[e].T
            y_TO = y_TO.index_add(0, token, h * weights_TK[token, slot, None])
    return y_TO


def masked(x_TD: Tensor, A_ELD: Tensor, B_EOL: Tensor, ids_TK: Tensor, weights_TK: Tensor, base_TO: Tensor) -> Tensor:
    """Two GEMMs over all experts with the gates between, by autograd."""
    E, L, D = A_ELD.shape
    gates_TE = torch.zeros(x_TD.shape[0], E).scatter(1, ids_TK, weights_TK)
    H_TEL = (x_TD @ A_ELD.reshape(E * L, D).T).view(-1, E, L) * gates_TE[..., None]
    return base_TO + H_TEL.flatten(1) @ B_EOL.permute(0, 2, 1).reshape(E * L, -1)


def grouped(x_TD: Tensor, A_ELD: Tensor, B_EOL: Tensor, ids_TK: Tensor, weights_TK: Tensor, base_TO: Tensor) -> Tensor:
    """`F.grouped_mm` on pairs sorted by expert."""
    _T, K = ids_TK.shape
    E = A_ELD.shape[0]
    order = ids_TK.reshape(-1).argsort(stable=True)
    offsets = torch.bincount(ids_TK.reshape(-1), minlength=E).cumsum(0).to(torch.int32)
    token = order // K
    h = nn.functional.grouped_mm(x_TD[token], A_ELD.transpose(1, 2), offs=offsets)
    y = nn.functional.grouped_mm(h, B_EOL.transpose(1, 2), offs=offsets) * weights_TK.reshape(-1)[order, None]
    return base_TO.index_add(0, token, y)


PEERS = {"loop": loop, "masked": masked, "grouped_mm": grouped}


def _inputs(T: int, E: int, K: int, D: int, O: int, L: int, *, transposed: bool = False) -> dict[str, Tensor]:
    """Inputs of a call, the same for all sides; B contiguous, as every bank has it, or `transposed`, in memory as [E, L, O]."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    B_EOL = rand(E, O, L) / L**0.5
    return {
        "x_TD": rand(T, D).requires_grad_(),
        "A_ELD": (rand(E, L, D) / D**0.5).requires_grad_(),
        "B_EOL": (B_EOL.transpose(1, 2).contiguous().transpose(1, 2) if transposed else B_EOL).requires_grad_(),
        "ids_TK": torch.rand(T, E, generator=generator).topk(K).indices,
        "weights_TK": torch.rand(T, K, generator=generator).requires_grad_(),
        "base_TO": rand(T, O).requires_grad_(),
    }


def _side(function: Callable[..., Tensor], inputs: dict[str, Tensor], backward: bool) -> Side:
    leaves = [t for t in inputs.values() if t.requires_grad]
    dy = torch.randn(inputs["base_TO"].shape)

    def both() -> None:
        torch.autograd.grad(function(*inputs.values()), leaves, dy)

    def forward() -> None:
        with torch.no_grad():
            function(*inputs.values())

    return both if backward else forward


def _ours(x: Tensor, A: Tensor, B: Tensor, ids: Tensor, weights: Tensor, base: Tensor) -> Tensor:
    return lora_experts(x, A, B, ids, weights, base_TO=base)


def operator_rows(rounds: int = 15, small: bool = False) -> Iterator[dict]:
    """One row a shape and layout of B: seconds of ours and of each peer, ratio to the best peer, noise."""
    for transposed in (False, True):
        yield from _operator_rows(rounds, small, transposed)


def _operator_rows(rounds: int, small: bool, transposed: bool) -> Iterator[dict]:
    shapes = [(8, 8), (8, 16), (64, 8), (64, 64)]
    widths = [576] if small else [576, 2048]
    for width in widths:
        for E, L in shapes:
            for T, backward in ((1, False), (8, False), (128, True), (1024, True)):
                inputs = _inputs(T, E, 2, width, width, L, transposed=transposed)
                sides = {name: _side(peer, inputs, backward) for name, peer in PEERS.items()}
                sides["ours"] = _side(_ours, inputs, backward)
                sides["ours again"] = _side(_ours, inputs, backward)
                times = alternate(sides, rounds)
                best = min(PEERS, key=lambda name: statistics.median(times[name]))
                yield {
                    "benchmark": "lora_experts",
                    "tokens": T,
                    "experts": E,
                    "rank": L,
                    "width": width,
                    "top_k": 2,
                    "B": "[E, L, O]" if transposed else "contiguous",
                    "mode": "forward+backward" if backward else "forward",
                    "us": {name: round(statistics.median(t) * 1e6, 1) for name, t in times.items()},
                    "best_peer": best,
                    "best_peer_over_ours": round(min(ratio(times, name, "ours") for name in PEERS), 3),
                    "noise": round(abs(ratio(times, "ours again", "ours") - 1), 3),
                }


# (inputs that share x and routing, width in, widths out) of a SmolLM2-135M decoder block
BLOCK = [("qkv", 576, (576, 192, 192)), ("o", 576, (576,)), ("gate_up", 576, (1536, 1536)), ("down", 1536, (576,))]


class RoutedBlock:
    """The block's linears with routed adapters; `grouped` shares one call among projections of one input."""

    def __init__(self, weights: dict[str, list[Tensor]], E: int, L: int, K: int, *, grouped: bool) -> None:
        self.weights, self.grouped, self.K = weights, grouped, K
        self.A = {n: [torch.randn(E, L, w.shape[1]).div_(24).requires_grad_() for w in ws] for n, ws in weights.items()}
        self.B = {n: [torch.randn(E, w.shape[0], L).div_(24).requires_grad_() for w in ws] for n, ws in weights.items()}
        self.routers = {n: torch.randn(E, ws[0].shape[1]).div_(24).requires_grad_() for n, ws in weights.items()}
        self.E = E

    def parameters(self) -> list[Tensor]:
        return [p for bank in (self.A, self.B) for ps in bank.values() for p in ps] + list(self.routers.values())

    def apply(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        gate, ids = (x @ self.routers[name].T).softmax(-1).topk(self.K)
        gate = gate / gate.sum(-1, keepdim=True)
        plan = route_plan(ids, self.E)
        parts = (self.weights[name], self.A[name], self.B[name])
        if self.grouped:
            ws, A, B = parts
            return lora_linear_group(x, ws, [None] * len(ws), A, B, ids, gate, plan=plan, scale=2.0)
        return tuple(
            lora_linear(x, w, None, a, b, ids, gate, plan=plan, scale=2.0) for w, a, b in zip(*parts, strict=True)
        )


class PeftBlock:
    """The block's linears as PEFT's LoRA layers."""

    def __init__(self, weights: dict[str, list[Tensor]], rank: int) -> None:
        from peft.tuners.lora import LoraConfig
        from peft.tuners.lora.layer import Linear

        self.layers: dict[str, list[nn.Module]] = {}
        for name, ws in weights.items():
            self.layers[name] = []
            for w in ws:
                base = nn.Linear(w.shape[1], w.shape[0], bias=False)
                base.weight = nn.Parameter(w, requires_grad=False)
                config = LoraConfig(r=rank, lora_alpha=2 * rank)
                layer = Linear(base, "default", r=rank, lora_alpha=2 * rank, config=config)
                nn.init.normal_(layer.lora_B["default"].weight, std=0.04)
                self.layers[name].append(layer)

    def parameters(self) -> list[Tensor]:
        return [p for ls in self.layers.values() for m in ls for p in m.parameters() if p.requires_grad]

    def apply(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers[name])


def _block_side(block: RoutedBlock | PeftBlock, x_TD: Tensor) -> Side:
    parameters = block.parameters()

    def step() -> None:
        q, k, v = block.apply("qkv", x_TD)
        # stands in for attention: each of q, k, v reaches the loss
        mixed = q * torch.cat([k, v, k], dim=1)
        h = block.apply("o", mixed)[0] + x_TD
        gate, up = block.apply("gate_up", h)
        y = block.apply("down", nn.functional.silu(gate) * up)[0] + h
        torch.autograd.grad(y, [x_TD, *parameters], torch.ones_like(y))

    return step


def block_rows(rounds: int = 15, T: int = 512) -> Iterator[dict]:
    """One row a peer: our block (grouped, single) against PEFT rank 16 and 64."""
    torch.manual_seed(0)
    weights = {name: [torch.randn(o, d) / d**0.5 for o in os_] for name, d, os_ in BLOCK}
    x_TD = torch.randn(T, 576, requires_grad=True)
    sides = {
        "ours": _block_side(RoutedBlock(weights, 8, 8, 2, grouped=True), x_TD),
        "ours single": _block_side(RoutedBlock(weights, 8, 8, 2, grouped=False), x_TD),
        "peft 16": _block_side(PeftBlock(weights, 16), x_TD),
        "peft 64": _block_side(PeftBlock(weights, 64), x_TD),
    }
    sides["ours again"] = sides["ours"]
    times = alternate(sides, rounds)
    yield {
        "benchmark": "lora_block",
        "tokens": T,
        "experts": 8,
        "rank": 8,
        "top_k": 2,
        "mode": "forward+backward",
        "us": {name: round(statistics.median(t) * 1e6, 1) for name, t in times.items()},
        "ours_over_peft16": round(1 / ratio(times, "peft 16", "ours"), 3),
        "ours_over_peft64": round(1 / ratio(times, "peft 64", "ours"), 3),
        "single_over_grouped": round(ratio(times, "ours single", "ours"), 3),
        "noise": round(abs(ratio(times, "ours again", "ours") - 1), 3),
    }


def gate_correctness() -> None:
    """Every side computes the same before any is timed."""
    inputs = _inputs(16, 8, 2, 24, 32, 4)
    expected = lora_experts(*list(inputs.values())[:5], base_TO=inputs["base_TO"], backend="reference")
    for function in (*PEERS.values(), _ours):
        torch.testing.assert_close(function(*inputs.values()), expected, rtol=1e-4, atol=1e-4)


def rows(rounds: int = 15, *, small: bool = False, which: str = "all") -> list[dict]:
    """All rows, each with device, versions and threads.

    Args:
        rounds: alternating rounds a row.
        small: width 576 only.
        which: "operator", "block" or "all".
    """
    gate_correctness()
    where = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": rounds,
    }
    found: list[dict] = []
    if which in ("block", "all"):
        found += block_rows(rounds)
    if which in ("operator", "all"):
        found += operator_rows(rounds, small)
    return [row | where for row in found]


def main() -> None:
    """Print one JSON row a line, and the geometric means by number of experts on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="width 576 only")
    parser.add_argument("--which", choices=("operator", "block", "all"), default="all")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    found = rows(options.rounds, small=options.small, which=options.which)
    for row in found:
        print(json.dumps(row))
    for layout in ("contiguous", "[E, L, O]"):
        for E in (8, 64):
            of = [row for row in found if row.get("B") == layout and row["experts"] == E]
            if ratios := [row["best_peer_over_ours"] for row in of]:
                mean, worst, count = statistics.geometric_mean(ratios), min(ratios), len(ratios)
                print(
                    f"B {layout}, {E} experts: geometric mean {mean:.3f}, worst {worst:.3f}, {count} shapes",
                    file=sys.stderr,
                )


if __name__ == "__main__":
    main()
