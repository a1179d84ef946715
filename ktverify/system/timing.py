"""Times in this process: the clock, statistics, the loop of warm-ups and repeats, and the load by other programs.

Times are integer nanoseconds: of time.perf_counter_ns on the CPU, of two events of the stream on CUDA, synchronised
before and after. The engines of `bench shapes` run in processes of their own, under any Python: bench/host.py times
them by the same rule, but imports nothing of ktverify.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import psutil

T = TypeVar("T")
PERCENTILES = (5, 10, 25, 75, 95)
# with fewer times than this, the 10th percentile is hardly above the minimum
ENOUGH_FOR_P10 = 10
# share of the processors that other programs have, from which on a time counts as disturbed
BUSY = 0.10

# The kernel counts the time of all processors in hundredths of a second. A share measured over less than a tenth of a
# second is therefore coarse; it is rounded down.
_GRAIN_S = 0.02
_LOOK_S = 0.05


class Clock:
    """Times calls on one device, "cpu" or "cuda…"."""

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device.startswith("cuda")

    def time(self, call: Callable[[], object]) -> int:
        """Nanoseconds that `call` takes, everything that it started being finished."""
        if not self.cuda:
            started = time.perf_counter_ns()
            call()
            return time.perf_counter_ns() - started
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
        cuts = statistics.quantiles(ordered, n=100, method="inclusive") if len(ordered) > 1 else ordered * 99
        return cls(
            count=len(ordered),
            mean=statistics.fmean(ordered),
            std=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
            median=statistics.median(ordered),
            min=ordered[0],
            max=ordered[-1],
            percentiles={share: cuts[share - 1] for share in PERCENTILES},
        )

    @property
    def spread(self) -> float:
        """How far the minimum may be off: the 10th percentile over the minimum, less 1; of few times the maximum."""
        top = self.percentiles[10] if self.count >= ENOUGH_FOR_P10 else self.max
        return top / self.min - 1


@dataclass(frozen=True)
class Ratio:
    """The minimum of some times over that of others. spread: the larger one of the two (`Statistics.spread`).

    A neighbour on the same core makes a loop up to four times slower for seconds, and a minute's median with it. The
    minimum of many short rounds needs one undisturbed round only.
    """

    value: float
    spread: float

    @classmethod
    def of(cls, upper: Statistics, lower: Statistics) -> Ratio:
        return cls(upper.min / lower.min, max(upper.spread, lower.spread))

    @property
    def clear(self) -> bool:
        """Whether the difference is larger than the spread between rounds."""
        return max(self.value, 1 / self.value) - 1 > self.spread


@functools.cache
def _annotate() -> Any:
    if importlib.util.find_spec("nvtx") is None:
        return None
    import nvtx

    return nvtx.annotate


def nvtx_range(name: str) -> AbstractContextManager[Any]:
    """A range of this name for Nsight (`nsys profile --trace=nvtx …`); nothing without the nvtx package."""
    annotate = _annotate()
    found: AbstractContextManager[Any] = contextlib.nullcontext() if annotate is None else annotate(name)
    return found


@dataclass(frozen=True)
class TimedCall:
    """One call. number: its place among the calls of that name; at, ns: begin since the time line began, duration."""

    name: str
    number: int
    at: int
    ns: int


class Timeline:
    """Times calls one after the other. Times are nanoseconds.

    annotate: gives each call its name in another tool, such as Nsight or torch's profiler, which take time themselves.
    """

    def __init__(
        self, device: str = "cpu", *, annotate: Callable[[str], AbstractContextManager[Any]] = nvtx_range
    ) -> None:
        self.calls: list[TimedCall] = []
        self.clock = Clock(device)
        self._annotate = annotate
        self._count: Counter[str] = Counter()
        self.restart()

    def restart(self) -> None:
        """Count the begin of later calls from now on."""
        self.began = time.perf_counter_ns()

    def measure(self, name: str, call: Callable[[], T]) -> T:
        """Time `call` and return its result. All work that it started is finished before the clock is read."""
        results: list[T] = []
        with self._annotate(name):
            at = time.perf_counter_ns() - self.began
            ns = self.clock.time(lambda: results.append(call()))
        self.calls.append(TimedCall(name, self._count[name], at, ns))
        self._count[name] += 1
        return results[0]

    def times(self, name: str) -> list[int]:
        """Nanoseconds of each call of this name, in order."""
        return [call.ns for call in self.calls if call.name == name]


def time_rounds(
    calls: Mapping[str, Callable[[], object]],
    *,
    warmup: int,
    repeats: int,
    clock: Clock | None = None,
    prepare: Callable[[], object] = bool,
) -> Iterator[tuple[int, dict[str, int]]]:
    """Time all `calls` in turn, round after round: (number of the round, nanoseconds by name).

    Rounds below 0 are the `warmup` rounds and do not count. A round takes one sample of every call, so that whatever
    else the machine does disturbs all of them alike. prepare: called before each round, outside of the times.
    """
    clock = clock or Clock()
    for number in range(-warmup, repeats):
        prepare()
        taken = {}
        with nvtx_range("repeat" if number >= 0 else "warm-up"):
            for name, call in calls.items():
                with nvtx_range(name):
                    taken[name] = clock.time(call)
        yield number, taken


# ---- other programs


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
        times = psutil.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests are counted in user time
        busy_s = sum(value for name, value in times.items() if name not in idle)
        return LoadReading(time.monotonic(), busy_s - own_s)

    def share(self, since: LoadReading | None = None) -> float:
        """The share of all processors that other programs had since `since`; None: since this object was made."""
        return (since or self.began).share_until(self.read())

    def wait(self, patience_s: float) -> None:
        """Return once other programs leave the processors alone for a moment, at the latest after `patience_s`."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            before = self.read()
            time.sleep(_LOOK_S)
            if self.share(before) < BUSY:
                return
