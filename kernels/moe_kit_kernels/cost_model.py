"""Which implementation of an operator to run: time modelled from static sizes, in plain Python.

A stage takes max(FLOPs / peak, bytes / bandwidth); a call has a fixed price on the CPU, where a walk over experts pays
it many times. The routing itself is never looked at, only P, E and the widths: asking costs no wait for a device.

    ridge = peak FLOP/s / bandwidth
    down (x A^T):  dense reads x once and computes E*L columns, sorted reads x once a pair and computes L:
                   dense wins while E*L < K * ridge
    up (+= H B^T): dense reads and writes y once, sorted once a pair:   dense wins while E*L < 2K * ridge

Sources: H100 and A100 figures are achieved rates of large bf16 GEMMs and streams, not data-sheet peaks; the CPU's were
measured on two cores with AVX-512 in float32. `decode` reads the chosen experts in place and sorts nothing.

Legend: T tokens, K slots a token, P pairs, E experts, D width in, O width out, L rank.
"""

from dataclasses import dataclass

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
    call: float
    """Fixed time of one call or launch, seconds."""
    host_walk: bool
    """True when sorted execution is a host loop: it pays calls for each expert, and its gathers do not overlap its GEMMs."""

    @property
    def ridge(self) -> float:
        """FLOP a byte at which GEMM and stream take equal time."""
        return self.flops / self.bandwidth


H100 = Device(name="h100", flops=650e12, narrow_flops=650e12, bandwidth=2.8e12, call=4e-6, host_walk=False)
A100 = Device(name="a100", flops=250e12, narrow_flops=250e12, bandwidth=1.7e12, call=4e-6, host_walk=False)
CPU = Device(name="cpu", flops=150e9, narrow_flops=60e9, bandwidth=10e9, call=4e-6, host_walk=True)


def device_of(device: torch.device) -> Device:
    """Find the rates of a torch device.

    Args:
        device: where a call runs.

    Returns:
        `CPU`; on a GPU `A100` up to compute capability 8, else `H100` (their ratio of FLOPs to bytes is what decides).
    """
    if device.type != "cuda":
        return CPU
    return A100 if torch.cuda.get_device_capability(device)[0] <= 8 else H100


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
    columns = shape.experts * shape.rank
    down = _stage(device, 2 * shape.tokens * columns * shape.d_in, shape.tokens * shape.d_in * shape.itemsize)
    up = _stage(device, 2 * shape.tokens * columns * shape.d_out, 2 * shape.tokens * shape.d_out * shape.itemsize)
    parameters = columns * shape.width * shape.itemsize
    if device.host_walk:
        # plain GEMMs want B side by side: read once for the copy, written, read again
        parameters += 2 * columns * shape.d_out * shape.itemsize
    return down + up + parameters / device.bandwidth + 8 * device.call


def sorted_seconds(shape: LoraShape, device: Device) -> float:
    """Model the forward of the sorted implementation: each pair reads its x and read-modify-writes its y.

    Args:
        shape: the call's sizes.
        device: its rates.

    Returns:
        Seconds.
    """
    active = min(shape.experts, shape.pairs)
    per_pair = shape.pairs * shape.itemsize
    rate = device.flops if shape.rank >= 32 else device.narrow_flops
    down = _stage(device, 2 * shape.pairs * shape.rank * shape.d_in, per_pair * shape.d_in, rate)
    up = _stage(device, 2 * shape.pairs * shape.rank * shape.d_out, 2 * per_pair * shape.d_out, rate)
    calls = 24 + 2 * active if device.host_walk else 3
    parameters = active * shape.rank * shape.width * shape.itemsize
    return down + up + parameters / device.bandwidth + calls * device.call


def decode_seconds(shape: LoraShape, device: Device) -> float:
    """Model the decode implementation: every pair reads its expert's A and B, nothing is sorted.

    Args:
        shape: the call's sizes.
        device: its rates.

    Returns:
        Seconds.
    """
    parameters = shape.pairs * shape.rank * shape.width * shape.itemsize
    # a matrix-vector call on a slice costs its two views as well
    calls = 4 + 3 * shape.pairs if device.host_walk else 2
    # one warp a row on a GPU leaves the matrix units idle; L2 gives about twice the memory's rate
    bandwidth = device.bandwidth if device.host_walk else 2 * device.bandwidth
    return parameters / bandwidth + calls * device.call


def choose_lora(shape: LoraShape, device: Device, *, training: bool) -> str:
    """Choose the implementation of LoRA experts with the least modelled time.

    Args:
        shape: the call's sizes.
        device: its rates.
        training: True when a gradient will be asked for; decode has none.

    Returns:
        "dense", "sorted" or "decode".
    """
    seconds = {"dense": dense_seconds(shape, device), "sorted": sorted_seconds(shape, device)}
    if not training:
        seconds["decode"] = decode_seconds(shape, device)
    return min(seconds, key=lambda name: seconds[name])


def _stage(device: Device, flops: float, bytes_: float, rate: float | None = None) -> float:
    compute, memory = flops / (rate or device.flops), bytes_ / device.bandwidth
    # a host loop gathers first and multiplies then; a narrow rate marks the stages that do so
    return compute + memory if device.host_walk and rate is not None else max(compute, memory)
