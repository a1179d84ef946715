"""The lines of a profile: `reports/runs/<stamp>-profile/profile.jsonl`. Times are integer nanoseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ktverify.bench.timed_run import CeilingLine, OtherLoadLine, RunLine, read_lines
from ktverify.engines.native.phase_times import StageTimes
from ktverify.runs.jsonl import JsonLine

FILE = "profile.jsonl"

Range = Literal["forward_only", "backward_only", "full_train_loop"]
RANGES: tuple[Range, ...] = ("forward_only", "backward_only", "full_train_loop")
# first: of a new layer, which packs its weights; plain: nothing recorded; recorded: with stage times
Pass = Literal["first", "warmup", "plain", "recorded"]


class ProfileLine(RunLine):
    """The run: one case on one instruction set."""

    kind: Literal["profile"] = "profile"
    case: str
    why: str
    isa: str
    tp: int
    workers: int


class CallPart(JsonLine):
    """A part of a call, measured in Python. at: since the call began; stages: of a recorded engine call."""

    name: str
    at: int
    ns: int
    stages: StageTimes | None = None

    @property
    def explained_ns(self) -> float:
        """The sum of the stages of a recorded engine call, else the whole part."""
        return self.ns if self.stages is None else sum(phase.wall_ns for phase in self.stages.phases)


class CallLine(JsonLine):
    """One call of a range, measured in Python. at: since the run began; parts: in order, with time between them."""

    kind: Literal["call"] = "call"
    range: Range
    which: Pass
    at: int
    ns: int
    parts: tuple[CallPart, ...]

    @property
    def stages(self) -> tuple[StageTimes, ...]:
        """The stage times of its recorded engine calls."""
        return tuple(part.stages for part in self.parts if part.stages is not None)


Line = ProfileLine | CeilingLine | CallLine | OtherLoadLine


def read(directory: Path) -> list[Line]:
    """The lines of a profile, without a last line that was cut off. FileNotFoundError without a file."""
    return read_lines(directory / FILE, Line)
