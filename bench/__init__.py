"""Benchmarks of moe_kit, run from a checkout: `python -m bench` lists them.

A comparison is paired: all sides run in one process, alternating within every round, and the figure is the median of the
per-round ratios, so that a slow moment of the machine hits all sides alike. One side also runs twice a round: the spread
of its ratio with itself is the noise that a difference must exceed.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """Result of one paired comparison."""

    median_ms: dict[str, float]
    """Median time of each side, milliseconds a call."""
    ratio: dict[str, float]
    """Median over rounds of time(side) / time(first side); above 1 the first side is faster."""
    noise: float
    """Distance from 1 of the first side's median ratio with itself."""
    rounds: int
    """Rounds measured."""


def paired(sides: dict[str, Callable[[], object]], *, rounds: int = 15, min_ms: float = 20.0) -> Paired:
    """Time several functions against the first one.

    Args:
        sides: Name -> function; the first is the reference of every ratio.
        rounds: Alternating rounds, at least 15 for a figure that is quoted.
        min_ms: Calls of one side in a round are repeated until about this much time has passed.

    Returns:
        Medians, ratios and the noise.
    """
    names = list(sides)
    guard = f"{names[0]} again"
    functions = {**sides, guard: sides[names[0]]}
    repeats = {}
    for name, function in functions.items():
        function()
        repeats[name] = max(1, round(min_ms / max(1e-3, _milliseconds(function, 1))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for turn in turns(order, rounds):
        for name in turn:
            times[name].append(_milliseconds(functions[name], repeats[name]))
    base = times[names[0]]

    def ratio(name: str) -> float:
        return statistics.median(t / b for t, b in zip(times[name], base))

    return Paired(
        median_ms={name: statistics.median(times[name]) for name in names},
        ratio={name: ratio(name) for name in names[1:]},
        noise=abs(ratio(guard) - 1),
        rounds=rounds,
    )


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Order of the sides in every round: random, the same in every run, and no side directly after itself.

    A side pays for what its neighbour left in the caches and in the allocator. Rotating the start would keep all
    neighbours but one: two copies of one side differed by 10 % that way.

    Args:
        names: The sides.
        rounds: How many rounds.

    Yields:
        All names, in a round's order.
    """
    draw, last = random.Random(0), None
    for _ in range(rounds):
        order = draw.sample(list(names), len(names))
        if order[0] == last:
            order.append(order.pop(0))
        yield order
        last = order[-1]


def _milliseconds(function: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) * 1e3 / repeats
