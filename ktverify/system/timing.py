"""Time calls in this process: calls with names on one time line, and the loop of warm-ups and repeats.

Whatever is timed in this process is timed here: layers, profiles, transformers, pipelines, and the latency check. The
module lies in `system`, next to the clock, because `checks` and `bench` both use it and `checks` may not import
`bench`. The engines of `bench shapes` run in processes of their own, under any Python: bench/host.py reads their clock.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from ktverify.system.clock import Clock

T = TypeVar("T")


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
