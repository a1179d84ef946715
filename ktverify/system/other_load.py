"""The processor time that other programs use while something is timed.

The kernel counts the time of all processors in hundredths of a second. A share measured over less than a tenth of a
second is therefore coarse; it is rounded down.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import psutil

# from this share on, a time counts as disturbed
BUSY = 0.10

_GRAIN_S = 0.02
_LOOK_S = 0.05


class Measured(Protocol):
    """A process that belongs to the measurement."""

    def cpu_ns(self) -> int: ...


@dataclass(frozen=True)
class LoadReading:
    """A moment in seconds, and the processor seconds that other programs have used until then."""

    at: float
    others: float

    def share_until(self, later: LoadReading) -> float:
        """The share of all processors, 0 to 1, that other programs had from this moment to the later one."""
        room = (later.at - self.at) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, later.others - self.others - _GRAIN_S) / room) if room > 0 else 0.0


class OtherLoad:
    """Separates the processor time of other programs from that of this process and of the processes in `own`."""

    def __init__(self, own: Callable[[], Iterable[Measured]] = tuple) -> None:
        self.own = own
        self.began = self.read()

    def read(self) -> LoadReading:
        own_s = time.process_time() + sum(process.cpu_ns() for process in self.own()) / 1e9
        return LoadReading(time.monotonic(), busy_seconds() - own_s)

    def share(self, since: LoadReading | None = None) -> float:
        """The share of all processors that other programs had since `since`, by default since this object was made."""
        return (since or self.began).share_until(self.read())

    def wait(self, patience_s: float) -> None:
        """Return once other programs leave the processors alone for a moment, at the latest after `patience_s`."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            before = self.read()
            time.sleep(_LOOK_S)
            if self.share(before) < BUSY:
                return


def busy_seconds() -> float:
    """Processor seconds that the machine has spent on anything, all processors together."""
    times = psutil.cpu_times()._asdict()
    return float(sum(value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice")))
