"""Summarise a profile: the typical call of each range, its stages, and the time that Python adds. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ktverify.bench.layer.profile_record import RANGES, CallLine, Line, ProfileLine, Range
from ktverify.bench.shapes import Work
from ktverify.bench.timed_run import CeilingLine, disturbed
from ktverify.engines.native.phase_times import Phase, StageTimes
from ktverify.system.timing import Statistics

# the parallel stages by direction, in the order in which a call passes them; without LoRA the last but one of a
# backward is missing
STAGES: dict[str, tuple[str, ...]] = {
    "forward": ("pack x, x A", "gate + up, silu", "h A", "down, merge"),
    "backward": ("gather dO, dO B", "down grad, silu'", "dg B, du B", "dx, LoRA grads"),
}


def stage_name(times: StageTimes, stage: int) -> str:
    """What a stage does."""
    names = STAGES[times.direction]
    if times.stages < len(names):
        names = (*names[: times.stages - 1], names[-1])
    return names[stage]


@dataclass(frozen=True)
class Worker:
    """One worker in one call, ns. busy: in its phases; barrier: from its last task of a stage to the stage's end;
    other: waiting for its turn, and time outside the stages. They add up to the call."""

    busy: int
    barrier: int
    other: int


def worker_of(times: StageTimes, worker: int) -> Worker:
    busy = times.busy_ns(worker)
    barrier = sum(span.end - span.work_end for span in times.spans[worker])
    return Worker(busy, barrier, times.wall_ns - busy - barrier)


def unexplained_ns(times: StageTimes) -> float:
    """Waiting in a call that belongs to no stage, mean over the workers. The phases add up to the call by construction,
    because waiting is what they leave; waiting at a barrier belongs to its stage."""
    return sum(worker_of(times, worker).other for worker in range(times.workers)) / times.workers


@dataclass(frozen=True)
class Imbalance:
    """One stage, ns: by how much its last worker finished after its first, and began after its first."""

    stage: int
    finish: int
    begin: int


def imbalances(times: StageTimes) -> list[Imbalance]:
    """One for every stage of a call; all zero with one worker."""
    found = []
    for stage in range(times.stages):
        ends = [spans[stage].work_end for spans in times.spans]
        begins = [spans[stage].begin for spans in times.spans]
        found.append(Imbalance(stage, max(ends) - min(ends), max(begins) - min(begins)))
    return found


@dataclass(frozen=True)
class RangeSummary:
    """One range. plain, recorded: milliseconds of the steady calls, without and with recording; typical: the recorded
    call of median length."""

    range: Range
    first: CallLine
    plain: Statistics
    recorded: Statistics
    typical: CallLine

    @property
    def explained(self) -> float:
        """The sum of the stages of its engine calls and of its other parts, over the time seen from Python."""
        return sum(part.explained_ns for part in self.typical.parts) / self.typical.ns

    @property
    def outside_ns(self) -> float:
        """The rest: Python's checks and new tensors around the engine, and the time between the parts."""
        return self.typical.ns * (1 - self.explained)

    @property
    def recording_ratio(self) -> float:
        """The median with recording over that without, calls in turn."""
        return self.recorded.median / self.plain.median


@dataclass(frozen=True)
class ProfileSummary:
    """A whole profile, its ranges in the order of RANGES. warmups: calls of each range between its first and the steady
    ones; read, multiply: the machine's ceilings, the best of several measurements; notes: warnings."""

    head: ProfileLine
    ranges: tuple[RangeSummary, ...]
    warmups: int
    read: float
    multiply: float
    notes: tuple[str, ...]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> ProfileSummary | None:
        """None where no range has its first and a steady call; the last range of a stopped run may be missing."""
        head = next((line for line in lines if isinstance(line, ProfileLine)), None)
        ceilings = [line for line in lines if isinstance(line, CeilingLine)]
        calls = [line for line in lines if isinstance(line, CallLine)]
        ranges = tuple(found for name in RANGES if (found := _range(name, calls)) is not None)
        if head is None or not ranges:
            return None
        read, multiply = (max((getattr(line, what) for line in ceilings), default=0.0) for what in ("read", "multiply"))
        warmups = sum(call.which == "warmup" and call.range == ranges[0].range for call in calls)
        return cls(head, ranges, warmups, read, multiply, tuple(disturbed(lines)))

    def roofline_ns(self, phase: Phase) -> float:
        """The least time of a phase at the machine's ceilings."""
        return 1e9 * Work(phase.bytes, phase.flops).seconds(self.read, self.multiply)


def _range(name: Range, calls: Sequence[CallLine]) -> RangeSummary | None:
    by = {which: [c for c in calls if c.range == name and c.which == which] for which in ("first", "plain", "recorded")}
    if not all(by.values()):
        return None
    steady = sorted(by["recorded"], key=lambda call: call.ns)
    plain, recorded = (Statistics.of([call.ns / 1e6 for call in by[which]]) for which in ("plain", "recorded"))
    return RangeSummary(name, by["first"][0], plain, recorded, steady[(len(steady) - 1) // 2])
