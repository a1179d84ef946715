"""The lines of `bench transformer`: `reports/runs/<stamp>-transformer/transformer.jsonl`. In nanoseconds and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ktverify.bench.timed_run import OtherLoadLine, RunLine, read_lines
from ktverify.bench.transformer.sizes import ModelSize
from ktverify.runs.jsonl import JsonLine

FILE = "transformer.jsonl"


class TransformerSettings(JsonLine):
    """What one process measures. Only num_steps count, not warmup_steps; threads: None for torch's own choice; check:
    time a step of an independent loop after each timed step."""

    size: ModelSize
    warmup_steps: int = 5
    num_steps: int = 10
    forward_only: bool = False
    device: str = "cpu"
    threads: int | None = None
    check: bool = False


class TransformerLine(RunLine):
    """The run. warmups: warm-up steps of each of its processes; the other settings are the same for all."""

    kind: Literal["transformer"] = "transformer"
    settings: TransformerSettings
    warmups: tuple[int, ...]


class ProcessLine(JsonLine):
    """A process that measures: the number of its warm-up steps, the device's name, its threads."""

    kind: Literal["process"] = "process"
    warmup: int
    device: str
    threads: int


class StepLine(JsonLine):
    """One step of the process with `warmup` warm-ups. step: below 0 for a warm-up; backward_ns: None with forward_only;
    loop_ns: the next whole step, by the independent loop."""

    kind: Literal["step"] = "step"
    warmup: int
    step: int
    forward_ns: int
    backward_ns: int | None = None
    loop_ns: int | None = None

    @property
    def ns(self) -> int:
        return self.forward_ns + (self.backward_ns or 0)


class EndLine(JsonLine):
    """A process is done. peak: resident memory, or the device's; loss: of the last step."""

    kind: Literal["end"] = "end"
    warmup: int
    peak: int
    loss: float


Line = TransformerLine | ProcessLine | StepLine | EndLine | OtherLoadLine


def read(directory: Path) -> list[Line]:
    """The lines of a run, without a last line that was cut off. FileNotFoundError without a file."""
    return read_lines(directory / FILE, Line)
