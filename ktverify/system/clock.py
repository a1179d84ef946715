"""The clock of everything that is timed in this process, and the statistics of times.

Times are integer nanoseconds: of time.perf_counter_ns on the CPU, of two events of the stream on CUDA, synchronised
before and after. bench/host.py times the engines of `bench shapes` by the same rule, but imports nothing of ktverify.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PERCENTILES = (5, 25, 75, 95)


class Clock:
    """Times calls on one device, "cpu" or "cuda…"."""

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device.startswith("cuda")

    def time(self, call: Callable[[], object]) -> int:
        """Nanoseconds that `call` takes, everything that it started being finished."""
        if self.cuda:
            return self._events(call)
        begin = time.perf_counter_ns()
        call()
        return time.perf_counter_ns() - begin

    def _events(self, call: Callable[[], object]) -> int:
        import torch

        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return int(1e6 * begin.elapsed_time(end))


def use_device(device: str) -> None:
    """Make "cuda:N" the process's present device, whose events the clock takes; "cuda" alone is it already."""
    index = device.partition(":")[2]
    if index:
        import torch

        torch.cuda.set_device(int(index))


@dataclass(frozen=True)
class Statistics:
    """Of some times, in their unit. std: of a sample (n - 1), 0 of one; percentiles: linear between neighbours."""

    count: int
    mean: float
    std: float
    median: float
    min: float
    max: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistics:
        """ValueError without a value."""
        if not values:
            raise ValueError("no time was measured, so there are no statistics")
        ordered = sorted(values)
        return cls(
            count=len(ordered),
            mean=statistics.fmean(ordered),
            std=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
            median=statistics.median(ordered),
            min=ordered[0],
            max=ordered[-1],
            percentiles={share: _percentile(ordered, share) for share in PERCENTILES},
        )


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = (len(ordered) - 1) * share / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
