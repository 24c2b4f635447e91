"""What layer routers save, in FLOPs and on the clock, on SmolLM2-135M; and quality against compute.

    python -m bench.depth bars [--rounds 15] [--only sequence execute token search] [--json FILE]
    python -m bench.depth compare --folder DIR [--seeds 0 1] [--steps 40] [--methods dense first ...]
    python -m bench.depth plot --folder DIR

The comparison is in `bench/depth_compare.py`.

Sequence scope: with d, r, z the cost of the plain model, of one with a share s of the routable layers skipped, and of
one with all of them skipped, (d - r) / (s (d - z)) is the share of the possible saving that is realised; 1 is ideal.
The plain model is one without any hook or router, whose parameters are the routed model's own: two copies in memory can
differ in time by more than a router costs. All sides of a figure run once a round in changing order, and figures are medians of per-round ratios.
Outputs are checked before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from bench import paired, turns
from bench.depth_compare import METHODS, Comparison, compare, plot
from moe_kit.depth import LayerRoutingConfig, force_layers
from moe_kit.depth.routers import evenly_spaced

PREFILL, DECODE = 256, 8


def base_model(layers: int | None = None) -> nn.Module:
    """SmolLM2-135M's shape with random weights: the cost does not depend on the values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers or 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def rounds_of(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every side in every round, in changing order."""
    names = list(sides)
    for name in names:
        sides[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for order in turns(names, rounds):
        for name in order:
            start = time.perf_counter()
            sides[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def flops(function: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Routes:
    """A model with fixed routes as a callable for prefill and for decoding, on caches of its own."""

    def __init__(self, model: Callable, table: list[list[int]] | None, ids: torch.Tensor) -> None:
        self.model, self.table, self.ids = model, table, ids
        self.cache: DynamicCache | None = None

    def forced(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.table is None else force_layers(self.model, self.table)

    @torch.no_grad()
    def prefill(self) -> Any:
        with self.forced():
            return self.model(self.ids, use_cache=True, logits_to_keep=1)

    def start(self) -> None:
        self.cache = self.prefill().past_key_values

    @torch.no_grad()
    def decode(self) -> None:
        assert self.cache is not None
        step = self.ids[:, :1]
        with self.forced():
            for _ in range(DECODE):
                self.model(step, past_key_values=self.cache, use_cache=True)
        # back to the prompt's end, so that every call does the same work; skipped layers hold nothing to remove
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is not None and layer.keys.dim() == 4:
                layer.crop(-DECODE)


def plain_and_routed() -> tuple[nn.Module, nn.Module]:
    """The plain model, and a fresh `dr_llm` router on a copy of its modules with the same parameters."""
    plain = base_model()
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    routed = get_peft_model(copy.deepcopy(plain, shared), LayerRoutingConfig.from_preset("dr_llm")).eval()
    assert routed.get_base_model().lm_head.weight is plain.lm_head.weight
    return plain, routed


def sequence_bars(rounds: int) -> list[dict[str, Any]]:
    """Realised share of the possible saving, for prefill and decode, batch 1 and 4, skip shares 1/4 and 1/2."""
    plain, routed = plain_and_routed()
    layers = plain.config.num_hidden_layers
    routable = list(range(1, layers))
    rows = []
    for batch in (1, 4):
        ids = torch.randint(0, 49152, (batch, PREFILL), generator=torch.Generator().manual_seed(1))

        def table(skipped: set[int]) -> list[list[int]]:
            return [[0 if layer in skipped else 1 for layer in range(layers)]]

        sides = {"dense": Routes(plain, None, ids), "none": Routes(routed, table(set(routable)), ids)}
        for share in (0.25, 0.5):
            sides[f"{share}"] = Routes(routed, table(evenly_spaced(routable, share)), ids)
        for side in sides.values():
            side.start()
        for phase in ("prefill", "decode"):
            calls = {name: getattr(side, phase) for name, side in sides.items()}
            counted = {name: flops(call) for name, call in calls.items()}
            times = rounds_of(calls, rounds)
            for share in (0.25, 0.5):
                exact = len(evenly_spaced(routable, share)) / len(routable)
                name = f"{share}"
                possible = counted["dense"] - counted["none"]
                ratios = [(d - r) / (exact * (d - z)) for d, r, z in zip(times["dense"], times[name], times["none"])]
                rows.append(
                    dict(
                        bar="sequence",
                        phase=phase,
                        batch=batch,
                        share=round(exact, 4),
                        flops_ratio=round((counted["dense"] - counted[name]) / (exact * possible), 4),
                        time_ratio=round(statistics.median(ratios), 4),
                        dense_ms=round(statistics.median(times["dense"]), 2),
                        routed_ms=round(statistics.median(times[name]), 2),
                        none_ms=round(statistics.median(times["none"]), 2),
                        rounds=rounds,
                    )
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def execute_bars(rounds: int) -> list[dict[str, Any]]:
    """Overhead of a fresh router, which executes everything, with its decision at prefill included."""
    plain, routed = plain_and_routed()
    rows = []
    for batch in (1, 4):
        ids = torch.randint(0, 49152, (batch, PREFILL), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, routed(ids).logits), "all-execute differs from the base model"
        sides = {"dense": Routes(plain, None, ids), "routed": Routes(routed, None, ids)}
        for side in sides.values():
            side.start()
        for phase in ("prefill", "decode"):
            result = paired({name: getattr(side, phase) for name, side in sides.items()}, rounds=rounds)
            rows.append(
                dict(
                    bar="execute",
                    phase=phase,
                    batch=batch,
                    overhead=round(result.ratio["routed"] - 1, 4),
                    noise=round(result.noise, 4),
                    dense_ms=round(result.median_ms["dense"], 2),
                    rounds=rounds,
                )
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def token_bars(rounds: int) -> list[dict[str, Any]]:
    """Time of an MLP at prefill of 512 tokens when half of them skip it, without and with a forecaster."""
    rows = []
    config = LayerRoutingConfig.from_preset("flexi", start=0.0)
    model = get_peft_model(base_model(2), config).eval()
    plain = base_model(2).model.layers[1].mlp
    mlp = model.get_base_model().model.layers[1].mlp
    unit = mlp.depth_unit
    x = torch.randn(1, 512, 576)
    # a gate that lets every other token through
    half = torch.arange(512) % 2
    with torch.no_grad():
        for action in (0, 3):
            codes = torch.where(half == 1, 1, action)
            replay = {unit.site("default"): codes[:, None]}
            unit.state.routing.context.replay = replay
            unit.state.routing.context.mask_BS = None
            dense = mlp.depth_unit and type(mlp).__mro__[1].forward(mlp, x)
            assert torch.allclose(mlp(x)[0, 1::2], dense[0, 1::2], atol=1e-4)
            result = paired({"dense": lambda: plain(x), "half": lambda: mlp(x)}, rounds=rounds)
            rows.append(
                dict(
                    bar="token",
                    skipped="skip" if action == 0 else "approximate",
                    ratio=round(result.ratio["half"], 4),
                    dense_ms=round(result.median_ms["dense"], 3),
                    noise=round(result.noise, 4),
                    rounds=rounds,
                )
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def search_bars(rounds: int) -> list[dict[str, Any]]:
    """Time of eight trees in lock-step against the same evaluations one at a time."""
    from moe_kit.depth.search import SearchConfig, search_paths

    model = get_peft_model(base_model(), LayerRoutingConfig.from_preset("dr_llm")).eval()
    generator = torch.Generator().manual_seed(3)
    questions = torch.randint(0, 49152, (8, 48), generator=generator)

    @torch.no_grad()
    def evaluate(rows: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
        ids = questions[[index for index, _ in rows]]
        with force_layers(model, [list(path) for _, path in rows]):
            logits = model(ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, 32:-1].transpose(1, 2), ids[:, 33:], reduction="none")
        return torch.exp(-loss.mean(1) / 4).tolist()

    def search(batch: int) -> tuple[float, list[dict[str, Any]]]:
        config = SearchConfig(simulations=5, stop="never", batch_size=batch)
        start = time.perf_counter()
        found = search_paths([f"q{i}" for i in range(8)], evaluate, num_layers=30, routable=range(1, 30), config=config)
        return time.perf_counter() - start, found

    evaluate([(0, (1,) * 30)])
    ratios, seconds = [], []
    for _ in range(rounds):
        (together, a), (alone, b) = search(8), search(1)
        assert a == b, "lock-step found other labels"
        ratios.append(together / alone)
        seconds.append(alone)
    row = dict(
        bar="search",
        trees=8,
        evaluations=sum(label["evaluations"] for label in a),
        ratio=round(statistics.median(ratios), 4),
        alone_s=round(statistics.median(seconds), 2),
        rounds=rounds,
    )
    print(json.dumps(row), flush=True)
    return [row]


BARS = {"sequence": sequence_bars, "execute": execute_bars, "token": token_bars, "search": search_bars}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the bars or draw the picture of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    bars = commands.add_parser("bars")
    bars.add_argument("--rounds", type=int, default=15)
    bars.add_argument("--only", nargs="*", choices=list(BARS), default=list(BARS))
    bars.add_argument("--json", type=Path)
    comparison = commands.add_parser("compare")
    for setting in dataclasses.fields(Comparison):
        if setting.name == "folder":
            comparison.add_argument("--folder", type=Path, required=True)
        elif isinstance(setting.default, tuple):
            kind, choices = (str, METHODS) if setting.name == "methods" else (int, None)
            comparison.add_argument(f"--{setting.name}", nargs="*", type=kind, choices=choices, default=setting.default)
        else:
            name = setting.name.replace("_", "-")
            comparison.add_argument(f"--{name}", type=type(setting.default), default=setting.default)
    picture = commands.add_parser("plot")
    picture.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    if options.command == "plot":
        print(plot(options.folder))
        return
    if options.command == "compare":
        compare(Comparison(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Comparison)}))
        return
    about = dict(torch=torch.__version__, threads=2, machine=platform.processor() or platform.machine())
    print(json.dumps(about), flush=True)
    rows = [
        row
        for name in options.only
        for row in BARS[name](max(3, options.rounds // 4) if name == "search" else options.rounds)
    ]
    if options.json is not None:
        options.json.write_text("".join(json.dumps({**about, **row}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
