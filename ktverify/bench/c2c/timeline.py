"""When the stages of the pipeline ran, and how long each took.

Comes in: calls, each with its stage. Goes out: spans, in nanoseconds. Light.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from ktverify.system.clock import Clock

T = TypeVar("T")

Stage = Literal["base_embedding", "base_prefill", "teacher_embedding", "teacher_prefill", "projector", "decode_step"]
# the lane of a trace that a stage stands in
LANES: dict[Stage, str] = {
    "base_embedding": "base",
    "base_prefill": "base",
    "teacher_embedding": "teacher",
    "teacher_prefill": "teacher",
    "projector": "projectors",
    "decode_step": "decode",
}


@dataclass(frozen=True)
class Span:
    """One call. at: nanoseconds since the timeline began; number: which one of its stage."""

    stage: Stage
    number: int
    at: int
    ns: int


class Timeline:
    """Measures one prompt's calls. annotate: also name them to torch's profiler, which takes time itself."""

    def __init__(self, device: str = "cpu", *, annotate: bool = False) -> None:
        self.spans: list[Span] = []
        self._clock = Clock(device)
        self._annotate = annotate
        self._calls: Counter[Stage] = Counter()
        self._begin = time.perf_counter_ns()

    def measure(self, stage: Stage, call: Callable[[], T]) -> T:
        """What `call` returns. Everything that it started is finished before the clock is read."""
        found: list[T] = []
        with self._named(stage):
            at = time.perf_counter_ns() - self._begin
            ns = self._clock.time(lambda: found.append(call()))
        self.spans.append(Span(stage, self._calls[stage], at, ns))
        self._calls[stage] += 1
        return found[0]

    def times(self, stage: Stage) -> list[int]:
        """Nanoseconds of each call of a stage, in order."""
        return [span.ns for span in self.spans if span.stage == stage]

    def _named(self, stage: Stage) -> contextlib.AbstractContextManager[object]:
        if not self._annotate:
            return contextlib.nullcontext()
        from torch.profiler import record_function

        return record_function(stage)
