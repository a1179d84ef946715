"""The lines of `bench layer` and `bench sweep`: `reports/runs/<stamp>-layer/layer.jsonl`. Integer nanoseconds, bytes.

Comes in: measurements, each written the moment it is made. Goes out: the same lines, read back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from ktverify.bench.timed_run import OtherLoadLine, RunLine
from ktverify.runs.jsonl import JsonLine, whole_lines

FILE = "layer.jsonl"

Varied = Literal["tp", "throughput", "qlen", "rank", "threads", "experts"]
SWEEPS: tuple[Varied, ...] = ("qlen", "rank", "threads", "experts")


class Spot(JsonLine):
    """One process that measures. varied, value: what it is one of, and the value there; batch: sequences that qlen is
    made of; threads: None for all; warmup: repeats that don't count; steps: of training, for memory."""

    number: int = 0
    varied: Varied = "tp"
    value: int = 1
    case: str
    batch: int = 1
    tp: int = 1
    threads: int | None = None
    isa: str | None = None
    warmup: int = 3
    repeats: int = 15
    steps: int = 5


class LayerLine(RunLine):
    """The run: all its spots, in the order in which they are measured."""

    kind: Literal["layer"] = "layer"
    case: str
    spots: tuple[Spot, ...]


class SpotLine(JsonLine):
    """A spot is loaded, and its first results were right. weights: bytes of the experts that tokens reach, in bf16;
    first_ns: the first forward, which packs them; rel_l2: of output and grad_input, some rows, against fp32."""

    kind: Literal["spot"] = "spot"
    number: int
    isa: str
    workers: int
    weights: int
    flops: float
    first_ns: int
    rel_l2: dict[str, float]


class RepeatLine(JsonLine):
    """One repeat at a spot, below 0 those that don't count. forward_ns: nothing kept; both_ns: forward and its backward
    under one clock; saving_ns, backward_ns: another such pair, a clock for each."""

    kind: Literal["repeat"] = "repeat"
    number: int
    repeat: int
    forward_ns: int
    both_ns: int
    saving_ns: int
    backward_ns: int


class MemoryLine(JsonLine):
    """Resident memory of a spot's process beyond what it had before there were inputs: with the weights loaded, after
    the first forward, after the first training step and after the last."""

    kind: Literal["memory"] = "memory"
    number: int
    loaded: int
    packed: int
    first_step: int
    last_step: int


class SpotOtherLoadLine(OtherLoadLine):
    """What others had of the processors during the repeats of one spot; number None: a file from before it was told."""

    number: int | None = None


Line = LayerLine | SpotLine | RepeatLine | MemoryLine | SpotOtherLoadLine
ADAPTER: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def read(directory: Path) -> list[Line]:
    """The lines of a run. FileNotFoundError without one; a last line that was cut off is left out."""
    return [ADAPTER.validate_json(line) for line in whole_lines(directory / FILE)]
