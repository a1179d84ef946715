"""The lines of a profile: `reports/runs/<stamp>-profile/profile.jsonl`. Times are integer nanoseconds.

Comes in: measurements, each written the moment it is made. Goes out: the same lines, read back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ktverify.bench.journal import whole_lines
from ktverify.machine import Machine
from ktverify.stages import StageTimes

FILE = "profile.jsonl"

Range = Literal["forward_only", "backward_only", "full_train_loop"]
RANGES: tuple[Range, ...] = ("forward_only", "backward_only", "full_train_loop")
# first: of a fresh layer, which packs its weights; plain: steady, nothing recorded; recorded: steady, with stages
Pass = Literal["first", "warmup", "plain", "recorded"]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProfileLine(_Line):
    """The run. read, multiply: the machine's ceilings, bytes and operations a second."""

    kind: Literal["profile"] = "profile"
    stamp: str
    command: str
    commit: str
    machine: Machine
    case: str
    why: str
    isa: str
    tp: int
    workers: int
    read: float
    multiply: float


class CallLine(_Line):
    """One call of one range, as Python sees it. at: nanoseconds since the run began; stages: as the engine recorded."""

    kind: Literal["call"] = "call"
    range: Range
    which: Pass
    at: int
    ns: int
    stages: tuple[StageTimes, ...] = ()

    @property
    def engine_ns(self) -> int:
        """What the engine saw of it: the wall time of its forward, its backward, or both."""
        return sum(times.wall_ns for times in self.stages)


class QuietLine(_Line):
    """Behind the calls: the share of the processors that other programs had meanwhile, 0 to 1."""

    kind: Literal["quiet"] = "quiet"
    others: float


Line = ProfileLine | CallLine | QuietLine
_ADAPTER: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def read(directory: Path) -> list[Line]:
    """The lines of a profile. FileNotFoundError without one; a last line that was cut off is left out."""
    return [_ADAPTER.validate_json(line) for line in whole_lines(directory / FILE)]
