"""The lines of a bench run: `reports/runs/<stamp>-bench/bench.jsonl`.

Times are integer nanoseconds, memory is bytes, rates are per second. Verdicts are those of all records: PASS (right,
and timed), MISTRUSTED (right, and faster than the machine can be; a summary says so, no line), FAIL (wrong, so not
timed), CRASH (died or raised), TIMEOUT (no answer in time), SKIP (not installed, or does not fit), UNSUPPORTED (says
that it cannot compute this).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ktverify.bench.timed_run import CeilingLine, OtherLoadLine, RunLine, read_lines
from ktverify.engines.native.phase_times import StageTimes
from ktverify.runs.jsonl import JsonLine, LineFile
from ktverify.runs.record import VerdictName

FILE = "bench.jsonl"

What = Literal["forward", "forward_saving", "backward"]


class HeadLine(RunLine):
    """The run. isa: the instruction set that all engines were limited to, "" for the best of each. cache_bytes: of all
    data caches; None in runs that are older than the field."""

    kind: Literal["bench"] = "bench"
    engines: tuple[str, ...]
    threads: int
    rounds: int
    warmup: int
    runs: int
    isa: str
    cache_bytes: int | None = None


class ShapeLine(JsonLine):
    """One shape. active: experts that tokens reach; then lower bounds of what one call reads and computes."""

    kind: Literal["shape"] = "shape"
    shape: str
    why: str
    case: str
    active: int
    weight_bytes: int
    forward_bytes: float
    forward_flops: float
    backward_bytes: float
    backward_flops: float


class EngineLine(JsonLine):
    """One engine at one shape, after its results were compared with the fp32 oracle.

    resident: growth of the process by loading. bits: of a base weight. rel_l2: by names of ktverify.spec.names. A later
    line of the same shape, run, group and engine replaces an earlier one, because an engine may die while it is timed.
    """

    kind: Literal["engine"] = "engine"
    shape: str
    run: int
    group: int
    engine: str
    title: str
    about: dict[str, str] = Field(default_factory=dict)
    lora: bool = True
    bits: int = 16
    forward: VerdictName
    backward: VerdictName
    reason: str = ""
    rel_l2: dict[str, float] = Field(default_factory=dict)
    resident: int = 0
    load_ns: int = 0


class TurnLine(JsonLine):
    """One call of one engine. others: the share of the processors that other programs had meanwhile."""

    kind: Literal["turn"] = "turn"
    shape: str
    run: int
    group: int
    round: int
    engine: str
    what: What
    ns: int
    others: float = 0.0


class RoundCeilingLine(CeilingLine):
    """The machine's two ceilings, measured in the same round with the same number of threads."""

    shape: str
    run: int
    group: int
    round: int
    isa: str
    others: float = 0.0


class StagesLine(JsonLine):
    """The stage times of one call of the native engine, recorded after the rounds of a group."""

    kind: Literal["stages"] = "stages"
    shape: str
    run: int
    group: int
    times: StageTimes


class GroupOtherLoadLine(OtherLoadLine):
    """After a group: the share of the processors that other programs used, and the engines that never became idle."""

    shape: str
    run: int
    group: int
    restless: tuple[str, ...] = ()


Line = HeadLine | ShapeLine | EngineLine | TurnLine | RoundCeilingLine | StagesLine | GroupOtherLoadLine


class BenchJournal(LineFile):
    """Keeps the lines of a run and appends each to its file."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / FILE)
        self.directory = directory
        self.lines: list[Line] = []

    def add(self, line: Line) -> None:
        self.lines.append(line)
        self.write(line)


def read(directory: Path) -> list[Line]:
    """The lines of a run, without a last line that was cut off. FileNotFoundError without a file."""
    return read_lines(directory / FILE, Line)
