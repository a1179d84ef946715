"""Whether a time can be true: no engine is faster than the machine reads from memory and multiplies.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ktverify.system.instruction_sets import PEAKS
from ktverify.system.text import read_text

# the share of the roofline time below which a time is not believed
PLAUSIBLE = 0.9


@dataclass(frozen=True)
class Work:
    """A lower bound of the work of one call: bytes read from memory, floating-point operations."""

    bytes: float
    flops: float

    def seconds(self, bytes_per_s: float, flop_per_s: float) -> float:
        """The roofline time: whichever of reading and multiplying takes longer.

        Williams, Waterman, Patterson: Roofline: an insightful visual performance model, CACM 52(4), 2009.
        """
        return max(self.bytes / bytes_per_s, self.flops / flop_per_s)

    def bound(self, bytes_per_s: float, flop_per_s: float) -> str:
        """ "memory" or "arithmetic": what the roofline time is made of."""
        return "memory" if self.bytes / bytes_per_s >= self.flops / flop_per_s else "arithmetic"


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches. read: bytes per second from memory; multiply: operations per second on `isa`; cache:
    bytes of all data caches; flags: the CPU's, as `Machine.flags`."""

    read: float
    multiply: float
    isa: str
    cache: int
    flags: tuple[str, ...]

    def too_fast(self, ms: float, work: Work) -> str:
        """Why a time of `ms` milliseconds for `work` cannot be true, in one line with the figures; "" where it may be.

        What the caches can keep from one call to the next need not be read.
        """
        beyond = max(0.0, work.bytes - self.cache)
        wider = max(PEAKS.get(flag, 1) for flag in (*self.flags, "")) / PEAKS.get(self.isa, 1)
        multiply = self.multiply * max(1.0, wider)
        least = 1e3 * Work(beyond, work.flops).seconds(self.read, multiply)
        if ms >= PLAUSIBLE * least:
            return ""
        return (
            f"{ms:.3g} ms cannot be true: {beyond / 1e9:.3g} GB at {self.read / 1e9:.3g} GB/s and "
            f"{work.flops / 1e9:.3g} GFLOP at {multiply / 1e9:.3g} GFLOP/s take {least:.3g} ms, and no engine "
            f"takes less than {PLAUSIBLE} of that"
        )


def cache_bytes() -> int:
    """Bytes of all data caches of this machine; 0 where the system does not tell."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        size = read_text(index / "size").strip()
        if size[:-1].isdigit() and read_text(index / "type").strip() != "Instruction":
            place = read_text(index / "level"), read_text(index / "shared_cpu_list")
            sizes[place] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    return sum(sizes.values())
