"""What a profile found: the typical call of each range, its stages, and the difference that Python makes.

Comes in: the lines of a profile. Goes out: `RangeSummary`, in the order of RANGES. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ktverify.bench.clock import Statistics
from ktverify.profile.record import RANGES, CallLine, Line, Range
from ktverify.stages import Phase, StageTimes

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
class RangeSummary:
    """One range. plain, recorded: milliseconds of the steady calls, without and with recording; typical: the recorded
    call of median length."""

    range: Range
    first: CallLine
    plain: Statistics
    recorded: Statistics
    typical: CallLine

    @property
    def stages_share(self) -> float:
        """The sum of the typical call's stages over the time seen from Python."""
        return sum(phase.wall_ns for times in self.typical.stages for phase in times.phases) / self.typical.ns

    @property
    def recording_ratio(self) -> float:
        """The median with recording over that without, calls in turn."""
        return self.recorded.median / self.plain.median


def summarise(lines: Sequence[Line]) -> list[RangeSummary]:
    """One for each range that has its first and a steady call; the last range of a stopped run may be missing."""
    found = []
    for name in RANGES:
        calls = [line for line in lines if isinstance(line, CallLine) and line.range == name]
        by = {which: [call for call in calls if call.which == which] for which in ("first", "plain", "recorded")}
        if not all(by.values()):
            continue
        steady = sorted(by["recorded"], key=lambda call: call.ns)
        plain, recorded = (Statistics.of([call.ns / 1e6 for call in by[which]]) for which in ("plain", "recorded"))
        found.append(RangeSummary(name, by["first"][0], plain, recorded, steady[(len(steady) - 1) // 2]))
    return found


def roofline_ns(phase: Phase, read: float, multiply: float) -> float:
    """The least time of a phase at the machine's ceilings (bench/shapes.py, Work)."""
    from ktverify.bench.shapes import Work

    return 1e9 * Work(phase.bytes, phase.flops).seconds(read, multiply)
