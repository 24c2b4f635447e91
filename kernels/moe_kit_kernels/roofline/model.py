"""Roofline model of kernels: what a launch costs, what a device can do, and the time that follows.

    time = max(HBM bytes / HBM bandwidth, L2 bytes / L2 bandwidth, FLOPs / peak)

L2 bytes are what the loops load and store, counted tile by tile (a test traces the interpreter and compares). HBM bytes are
those that miss an LRU cache of the L2's size, walked in the kernel's real tile order; rows of x are single entries, so a
token that several experts read hits while it is still there. FLOPs include the empty part of an expert's last tile. The
devices' figures are achieved rates assumed for a well-tuned kernel, not measurements of this one.

Counts of single kernels are in `grouped` and `lora`, designs made of several in `designs_experts` and `designs_lora`.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Rates of one GPU, per second and in bytes."""

    name: str
    """Name in tables."""
    flops: float
    """Achieved dense bf16 FLOP/s."""
    hbm: float
    """Achieved HBM byte/s."""
    l2: float
    """Achieved L2 byte/s."""
    cache: int
    """L2 size, bytes."""


H100 = Device("H100", 650e12, 2.8e12, 5.5e12, 50_000_000)
A100 = Device("A100", 250e12, 1.7e12, 4.0e12, 40_000_000)


@dataclass(frozen=True)
class Cost:
    """Work of one kernel or of several in a row."""

    hbm_bytes: float
    """Bytes from and to HBM."""
    l2_bytes: float
    """Bytes that the programs load and store."""
    flops: float
    """Floating-point operations, padding of tiles included."""
    launches: int = 1
    """Kernel launches."""

    def seconds(self, device: Device) -> float:
        """Return the modelled time of one kernel: its slowest resource."""
        return max(self.hbm_bytes / device.hbm, self.l2_bytes / device.l2, self.flops / device.flops)


class Cache:
    """An LRU cache of entries with sizes; counts the bytes that come from memory and those that go back."""

    def __init__(self, size: int):
        self.size, self.used, self.moved = size, 0, 0
        # key -> (bytes, written since it came)
        self.entries: OrderedDict[Hashable, tuple[int, bool]] = OrderedDict()

    def read(self, key: Hashable, size: int) -> None:
        """Read one entry; a miss loads it and evicts the oldest.

        Args:
            key: What is read.
            size: Its bytes.
        """
        self._use(key, size, fetched=True, dirty=False)

    def write(self, key: Hashable, size: int) -> None:
        """Write one entry whole; its bytes go to memory when it is evicted, or in `flush`.

        Args:
            key: What is written.
            size: Its bytes.
        """
        self._use(key, size, fetched=False, dirty=True)

    def flush(self) -> int:
        """Write back what is left and return all bytes moved."""
        self.moved += sum(size for size, dirty in self.entries.values() if dirty)
        self.entries.clear()
        self.used = 0
        return self.moved

    def _use(self, key: Hashable, size: int, fetched: bool, dirty: bool) -> None:
        if key in self.entries:
            self.entries.move_to_end(key)
            if dirty:
                self.entries[key] = size, True
            return
        if fetched:
            self.moved += size
        self.entries[key] = size, dirty
        self.used += size
        while self.used > self.size:
            _, (freed, was_dirty) = self.entries.popitem(last=False)
            self.used -= freed
            self.moved += freed if was_dirty else 0


def seconds(kernels: Iterable[Cost], device: Device, launch: float = 6e-6) -> float:
    """Return the modelled time of kernels in a row; launches beyond the first of a kernel cost `launch` seconds each.

    Args:
        kernels: Costs in order.
        device: Rates.
        launch: Seconds a launch that nothing hides.

    Returns:
        Seconds.
    """
    return sum(max(kernel.seconds(device), (kernel.launches - 1) * launch) for kernel in kernels)
