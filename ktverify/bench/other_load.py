"""Who else computes on this machine: processor time that other programs than the bench have.

Comes in: the bench's processes. Goes out: shares of the processors, 0 to 1. The kernel counts all processors' time in
hundredths of a second, so a share over less than a tenth of a second says little and is rounded down.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil

from ktverify.bench.engines import Process

# from this share on, a time is disturbed
BUSY = 0.10

_GRAIN_S = 0.02
_LOOK_S = 0.05


@dataclass(frozen=True)
class Reading:
    """A moment (seconds) and the processor seconds that others have had until then."""

    at: float
    others: float

    def share_until(self, later: Reading) -> float:
        """The share of all processors that others had from this moment to the later one."""
        room = (later.at - self.at) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, later.others - self.others - _GRAIN_S) / room) if room > 0 else 0.0


class Neighbours:
    """Tells the bench's own use of the processors from that of others."""

    def __init__(self, processes: Callable[[], Iterable[Process]]) -> None:
        self.processes = processes

    def read(self) -> Reading:
        ours = time.process_time() + sum(process.cpu_ns() for process in self.processes()) / 1e9
        return Reading(time.monotonic(), busy_seconds() - ours)

    def wait(self, patience_s: float) -> None:
        """Return when others leave the processors alone for a moment, or when patience ends."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            before = self.read()
            time.sleep(_LOOK_S)
            if before.share_until(self.read()) < BUSY:
                return


def busy_seconds() -> float:
    """Processor seconds that the machine has spent on anything, all processors together."""
    times = psutil.cpu_times()._asdict()
    return float(sum(value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice")))
