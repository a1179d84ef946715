"""The lines of `bench kernels`: `reports/runs/<stamp>-kernels/kernels.jsonl`. In nanoseconds, rates per second."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ktverify.bench.timed_run import CeilingLine, OtherLoadLine, RunLine, read_lines
from ktverify.runs.jsonl import JsonLine

FILE = "kernels.jsonl"


class KernelsLine(RunLine):
    """The run. n, k: rows and columns of a matrix of W."""

    kind: Literal["kernels"] = "kernels"
    isa: str
    threads: int
    n: int
    k: int


class TunableLine(JsonLine):
    """One tunable at one number of rows. bytes, flops: of one call, without padding."""

    kind: Literal["tunable"] = "tunable"
    number: int
    tunable: str
    today: str
    product: str
    rows: int
    bytes: float
    flops: float


class TimeLine(JsonLine):
    """One call with one value of the spot's tunable."""

    kind: Literal["time"] = "time"
    number: int
    round: int
    value: str
    ns: int


class TunableCeilingLine(CeilingLine):
    """The machine's ceilings in one round of a spot."""

    number: int
    round: int


class OtherBitsLine(JsonLine):
    """A value with which the kernel computes other bits than today's: it gets no time."""

    kind: Literal["bits"] = "bits"
    number: int
    value: str


Line = KernelsLine | TunableLine | TimeLine | TunableCeilingLine | OtherBitsLine | OtherLoadLine


def read(directory: Path) -> list[Line]:
    """The lines of a run, without a last line that was cut off. FileNotFoundError without a file."""
    return read_lines(directory / FILE, Line)
