"""Which implementation of an operator to run: time modelled from static sizes, in plain Python.

On a GPU a stage takes max(memory bytes / bandwidth, waves * max(FLOPs / peak, L2 bytes / L2 bandwidth)), of the kernels as
written; on the CPU, where a walk over experts pays a call's fixed price many times, max(FLOPs / peak, bytes / bandwidth) and those calls.
The routing itself is never looked at, only P, E and the widths: asking costs no wait for a device.

    waves = ceil(tiles / processors) / (tiles / processors), what a last, partly filled round of tiles costs: arithmetic
            and L2 ports belong to a processor, memory to all of them
    ridge = peak FLOP/s / bandwidth
    down (x A^T):  dense reads x once and computes E*L columns, sorted reads x once a pair and computes L:
                   with GEMMs at the peak dense wins while E*L < K * ridge
    up (+= H B^T): dense reads and writes y once, sorted once a pair:   dense wins while E*L < 2K * ridge

NOTE: our kernels cross over earlier. Sorted reads x once where all A stay in L2 and keeps a block of y there, so it moves
about what dense does; and a dense tile of 128 x 128 makes 64 FLOPs a byte of L2, under the 118 that an H100 wants (the 62 of
an A100 are met). The two lines above stand for library GEMMs against a read-modify-write from memory for every pair.

Sources: H100 and A100 figures are achieved rates of large bf16 GEMMs and streams, not data-sheet peaks; the CPU's were
measured on two cores with AVX-512 in float32. `decode` reads the chosen experts in place and sorts nothing.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of a device, as achieved by real kernels."""

    name: str
    """Short name."""
    flops: float
    """GEMM rate of wide products, FLOP/s."""
    narrow_flops: float
    """GEMM rate when one side is a small rank (8 to 16), FLOP/s."""
    bandwidth: float
    """Main memory stream, byte/s."""
    l2: float = math.inf
    """L2 stream, byte/s; infinity where no stage is bound by it."""
    cache: int = 0
    """L2 size, bytes; 0 where no stage depends on it."""
    call: float
    """Fixed time of one call or launch, seconds."""
    processors: int = 1
    """Programs that run at once, each with its share of the GEMM rate and of L2: the multiprocessors of a GPU."""
    capability: int = 0
    """Compute capability times ten, on which some tiles depend; 0 for a host."""
    native_flops: float = math.inf
    """Rate of compiled code that walks pairs without a gather, FLOP/s; on a host."""
    host_walk: bool
    """True when sorted execution is a host loop: it pays calls for each expert, and its gathers do not overlap its GEMMs."""

    @property
    def ridge(self) -> float:
        """FLOP a byte at which GEMM and stream take equal time."""
        return self.flops / self.bandwidth


H100 = Device(
    name="h100", flops=650e12, narrow_flops=650e12, bandwidth=2.8e12, l2=5.5e12, cache=50_000_000, call=4e-6,
    processors=132, capability=90, host_walk=False,
)  # fmt: skip
A100 = Device(
    name="a100", flops=250e12, narrow_flops=250e12, bandwidth=1.7e12, l2=4.0e12, cache=40_000_000, call=4e-6,
    processors=108, capability=80, host_walk=False,
)  # fmt: skip
CPU = Device(name="cpu", flops=150e9, narrow_flops=60e9, bandwidth=10e9, call=4e-6, native_flops=90e9, host_walk=True)


def device_of(device: torch.device) -> Device:
    """Find the rates of a torch device.

    Args:
        device: where a call runs.

    Returns:
        `CPU`; on a GPU the rates of `A100` up to compute capability 8, else of `H100` (their ratio of FLOPs to bytes is
        what decides), with the multiprocessors and the capability of the GPU itself.
    """
    return CPU if device.type != "cuda" else _gpu(device)


@lru_cache(maxsize=16)
def _gpu(device: torch.device) -> Device:
    major, minor = torch.cuda.get_device_capability(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return replace(A100 if major <= 8 else H100, processors=count, capability=10 * major + minor)


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """Sizes of one call of LoRA experts."""

    tokens: int
    """T."""
    pairs: int
    """P, dropped pairs included."""
    experts: int
    """E."""
    rank: int
    """L."""
    d_in: int
    """D."""
    d_out: int
    """O."""
    itemsize: int = 4
    """Bytes an element."""

    @property
    def width(self) -> int:
        """D + O: both GEMMs together."""
        return self.d_in + self.d_out


def dense_seconds(shape: LoraShape, device: Device) -> float:
    """Model the forward of the dense implementation: two GEMMs over all experts.

    Args:
        shape: the call's sizes.
        device: its rates.

    Returns:
        Seconds.
    """
    if not device.host_walk:
        stages = gpu_stages(shape, device)
        return stages["dense down"] + stages["dense up"]
    columns = shape.experts * shape.rank
    down = _host_stage(device, 2 * shape.tokens * columns * shape.d_in, shape.tokens * shape.d_in * shape.itemsize)
    up = _host_stage(device, 2 * shape.tokens * columns * shape.d_out, 2 * shape.tokens * shape.d_out * shape.itemsize)
    # B is joined in runs no larger than a result: a copy that counts as little
    parameters = columns * shape.width * shape.itemsize
    return down + up + parameters / device.bandwidth + 8 * device.call


def sorted_seconds(shape: LoraShape, device: Device) -> float:
    """Model the forward of the sorted implementation: each pair reads its x and read-modify-writes its y.

    Args:
        shape: the call's sizes.
        device: its rates.

    Returns:
        Seconds.
    """
    if not device.host_walk:
        stages = gpu_stages(shape, device)
        return stages["work lists"] + stages["slot lists"] + stages["sorted down"] + stages["sorted up"]
    active = min(shape.experts, shape.pairs)
    per_pair = shape.pairs * shape.itemsize
    rate = device.flops if shape.rank >= 32 else device.narrow_flops
    down = _host_stage(device, 2 * shape.pairs * shape.rank * shape.d_in, per_pair * shape.d_in, rate)
    up = _host_stage(device, 2 * shape.pairs * shape.rank * shape.d_out, 2 * per_pair * shape.d_out, rate)
    parameters = active * shape.rank * shape.width * shape.itemsize
    return down + up + parameters / device.bandwidth + (24 + 2 * active) * device.call


def mixed_seconds(shape: LoraShape, device: Device) -> float:
    """Model sorted down and dense up, which only the GPU kernels have.

    Args:
        shape: the call's sizes.
        device: its rates.

    Returns:
        Seconds; infinity where sorted execution is a host loop.
    """
    if device.host_walk:
        return math.inf
    stages = gpu_stages(shape, device)
    return stages["work lists"] + stages["sorted down"] + stages["dense up"]


def gpu_stages(shape: LoraShape, device: Device) -> dict[str, float]:
    """Model each stage of the Triton kernels as written, with the tiles that their launchers take.

    Args:
        shape: the call's sizes.
        device: its rates.

    Returns:
        Seconds of "dense down", "dense up", "sorted down" with its "work lists", and "sorted up" with its "slot lists".
    """
    # its package asks this model, so it cannot be imported before it
    from moe_kit_kernels.lora_experts import tiles
    from moe_kit_kernels.route_plan import tile_height

    T, P, E, L, D, O, s = (
        shape.tokens, shape.pairs, shape.experts, shape.rank, shape.d_in, shape.d_out, shape.itemsize
    )  # fmt: skip
    slots = max(1, -(-P // max(1, T)))
    x, y, h, A, B = T * D * s, T * O * s, P * L * s, E * L * D * s, E * L * O * s

    # a row tile reads the whole bank, a column block all of x
    EB, LP = tiles.column_block(E, L)
    blocks, row_tiles = -(-E // EB), -(-T // tiles.down_tile(T, E, L, s)["BM"])
    l2 = x * blocks + A * row_tiles + h
    dense_down = _gpu_stage(device, 2 * T * blocks * EB * LP * D, x + A + h, l2, row_tiles * blocks)
    more = {"capability": device.capability, "itemsize": s, "columns": E * LP}
    tile = tiles.up_tile(T, O, slots, linear=False, **more)
    BC, LP = tiles.up_columns(E, L, s, tile["BM"], slots)
    row_tiles, column_tiles = -(-T // tile["BM"]), -(-O // tile["BN"])
    l2 = 2 * y + h * column_tiles + B * row_tiles
    flops = 2 * T * -(-E * LP // BC) * BC * O
    dense_up = _gpu_stage(device, flops, 2 * y + B + h, l2, row_tiles * column_tiles)

    # a tile reads its expert's matrix; on average an expert's last tile is half empty
    active = min(E, P)
    rows, padded = tiles.down_rows(P, E, L, s), max(16, LP)
    count = P / rows + active / 2
    # x once for all pairs of a token while the bank stays in cache, else once a pair
    once = x if tiles.by_token(E, L, D, s) else P * D * s
    reads = P * D * s + count * L * D * s + h
    sorted_down = _gpu_stage(device, 2 * count * rows * padded * D, once + active * L * D * s + h, reads, count)
    rows = tile_height(T, E)
    # of one slot, whose launches follow each other
    count, tile = T / rows + min(E, T) / 2, tiles.sorted_tile(rows, L, s)
    width = min(O, tiles.group_columns(T, s, tile["BN"]))
    groups = -(-O // width)
    l2 = 2 * P * O * s + h * -(-O // tile["BN"]) + slots * count * L * O * s
    flops = 2 * slots * count * rows * -(-L // tile["BL"]) * tile["BL"] * O
    sorted_up = _gpu_stage(device, flops, 2 * y + active * L * O * s + h, l2, count * -(-width // tile["BN"]))
    return {
        "dense down": dense_down + device.call,
        "dense up": dense_up + device.call,
        "sorted down": sorted_down + device.call,
        "sorted up": max(sorted_up, slots * groups * device.call) + device.call,
        # the launches of `route_plan.triton`, once a plan, which the linears of a block share: three for the order, one for the
        # tiles and one to go by token; weight gradients need the order in any case
        "work lists": (5 if tiles.by_token(E, L, D, s) else 4) * device.call,
        "slot lists": device.call,
    }


def decode_seconds(shape: LoraShape, device: Device, *, looked_up: bool = True) -> float:
    """Model the decode implementation: every pair reads its expert's A and B, nothing is sorted.

    Args:
        shape: the call's sizes.
        device: its rates.
        looked_up: on a host, whether the caller keeps one view for each expert, as linears that decode do.

    Returns:
        Seconds.
    """
    parameters = shape.pairs * shape.rank * shape.width * shape.itemsize
    # a matrix-vector call on a slice costs its two views as well
    calls = 2.0 if not device.host_walk else 4 + 3 * shape.pairs if looked_up else 10 + 3 * shape.pairs
    # one warp a row on a GPU leaves the matrix units idle; L2 gives about twice the memory's rate
    bandwidth = device.bandwidth if device.host_walk else 2 * device.bandwidth
    return parameters / bandwidth + calls * device.call


def native_seconds(shape: LoraShape, device: Device) -> float:
    """Model the native implementation on a host: the chosen pairs in place, by compiled code.

    Args:
        shape: the call's sizes.
        device: its rates.

    Returns:
        Seconds.
    """
    parameters = min(shape.experts, shape.pairs) * shape.rank * shape.width * shape.itemsize
    flops = 2 * shape.pairs * shape.rank * shape.width
    return max(flops / device.native_flops, parameters / device.bandwidth) + 2 * device.call


def native_rows_pay(pairs: int, experts: int, *widths: int) -> bool:
    """Tell whether compiled code beats a library's product an expert on a host: while few rows share each matrix.

    Measured on two cores with AVX-512, whole feed-forward experts with all gradients: 0.94 to 1.4 times as fast up to 256 rows an
    expert, 0.9 to 1.05 at 512; rows that cross cache lines cost compiled code more than a library, which copies them first: 1.05 to
    1.4 with 16 rows an expert, 0.9 with 64.

    Args:
        pairs: P.
        experts: E.
        *widths: sizes of the matrices.

    Returns:
        Its answer, from sizes alone.
    """
    aligned = all(width % 16 == 0 for width in widths)
    return pairs <= (256 if aligned else 32) * experts


def linear_seconds(shape: LoraShape, device: Device, *, training: bool) -> dict[str, float]:
    """Model a frozen linear with its experts on a GPU: the base product inside our kernel, or the vendor's GEMM before it.

    The vendor's GEMM is counted generously: operands once from memory, L2 in blocks of 256 x 256, no partly filled round.

    Args:
        shape: the call's sizes; D and O are the linear's.
        device: its rates.
        training: add dx of the backward, in which D and O swap; weight gradients are the same on both sides.

    Returns:
        Seconds of "fused", dense down and the up product that goes on over the experts' columns, and "separate", the GEMM and
        the best of the forms of LoRA experts.
    """
    fused, separate = _linear_pass(shape, device)
    if training:
        swapped = replace(shape, d_in=shape.d_out, d_out=shape.d_in)
        back = _linear_pass(swapped, device)
        # dx of the experts is written by itself, and autograd adds it to that of the base
        added = 2 * shape.tokens * shape.d_in * shape.itemsize / device.bandwidth + device.call
        fused, separate = fused + back[0], separate + back[1] + added
    return {"fused": fused, "separate": separate}


def _linear_pass(shape: LoraShape, device: Device) -> tuple[float, float]:
    from moe_kit_kernels.lora_experts import tiles

    T, E, L, D, O, s = shape.tokens, shape.experts, shape.rank, shape.d_in, shape.d_out, shape.itemsize
    stages = gpu_stages(shape, device)
    x, W, y, h, B = T * D * s, O * D * s, T * O * s, shape.pairs * L * s, E * L * O * s
    slots = max(1, -(-shape.pairs // max(1, T)))
    tile = tiles.up_tile(T, O, slots, linear=True, capability=device.capability, itemsize=s)
    BC, LP = tiles.up_columns(E, L, s, tile["BM"], slots)
    rows, columns = -(-T // tile["BM"]), -(-O // tile["BN"])
    flops = 2 * T * O * (D + -(-E * LP // BC) * BC)
    l2 = (x + h) * columns + (W + B) * rows + y
    # a row of tiles sweeps W, which comes from memory again for the next row unless it stays in cache
    swept = W if device.cache >= W else W * rows
    up = _gpu_stage(device, flops, x + swept + y + h + B, l2, rows * columns)
    l2 = x * -(-O // 256) + W * -(-T // 256) + y
    base = _gpu_stage(device, 2 * T * O * D, x + W + y, l2, device.processors)
    lora = min(dense_seconds(shape, device), mixed_seconds(shape, device), sorted_seconds(shape, device))
    return stages["dense down"] + up + device.call, base + lora + device.call


_TIE = 1.02


def choose_lora(
    shape: LoraShape, device: Device, *, training: bool, looked_up: bool = True, native: bool = False
) -> str:
    """Choose the implementation of LoRA experts with the least modelled time.

    Args:
        shape: the call's sizes.
        device: its rates.
        training: True when a gradient will be asked for; decode has none.
        looked_up: see `decode_seconds`.
        native: compiled code serves the call.

    Returns:
        "dense", "sorted" or "decode"; "native" where that serves; on a GPU also "mixed", sorted down and dense up.
    """
    modelled = {"dense": dense_seconds, "mixed": mixed_seconds, "sorted": sorted_seconds}
    if native:
        modelled = {"native": native_seconds, **modelled}
    seconds = {name: model(shape, device) for name, model in modelled.items()}
    if not training:
        seconds["decode"] = decode_seconds(shape, device, looked_up=looked_up)
    # within what the model can tell, the form with the fewest launches: they are in that order
    least = min(seconds.values())
    return next(name for name, value in seconds.items() if value <= _TIE * least or value == least)


def _host_stage(device: Device, flops: float, bytes_: float, rate: float | None = None) -> float:
    # a host loop gathers first and multiplies then; a narrow rate marks the stages that do so
    compute, memory = flops / (rate or device.flops), bytes_ / device.bandwidth
    return max(compute, memory) if rate is None else compute + memory


def _gpu_stage(device: Device, flops: float, bytes_: float, l2_bytes: float, tiles: float) -> float:
    rounds = max(1.0, tiles) / device.processors
    waves = math.ceil(rounds) / rounds
    return max(bytes_ / device.bandwidth, waves * max(flops / device.flops, l2_bytes / device.l2))
