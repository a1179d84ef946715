"""The lines of `bench layer` and `bench sweep`: `reports/runs/<stamp>-layer/layer.jsonl`. In nanoseconds and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ktverify.bench.timed_run import OtherLoadLine, RunLine, read_lines
from ktverify.runs.jsonl import JsonLine

FILE = "layer.jsonl"

Varied = Literal["tp", "throughput", "qlen", "rank", "threads", "experts"]
SWEEPS: tuple[Varied, ...] = ("qlen", "rank", "threads", "experts")


class Spot(JsonLine):
    """One process that measures. varied, value: the quantity that the run varies, and its value here; batch: number of
    sequences in qlen; threads: None for all; warmup: repeats that do not count; steps: training steps, for memory."""

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
    """The run with all its spots, in the order of measurement."""

    kind: Literal["layer"] = "layer"
    case: str
    spots: tuple[Spot, ...]


class SpotLine(JsonLine):
    """A spot whose first results were right. weights: bytes of the active experts in bf16; first_ns: the first forward,
    which packs them; rel_l2: of some rows of output and grad_input, against fp32."""

    kind: Literal["spot"] = "spot"
    number: int
    isa: str
    workers: int
    weights: int
    flops: float
    first_ns: int
    rel_l2: dict[str, float]


class RepeatLine(JsonLine):
    """One repeat at a spot; below 0 it does not count. forward_ns: nothing saved; both_ns: forward and backward in one
    measurement; saving_ns, backward_ns: another such pair, measured one by one."""

    kind: Literal["repeat"] = "repeat"
    number: int
    repeat: int
    forward_ns: int
    both_ns: int
    saving_ns: int
    backward_ns: int


class MemoryLine(JsonLine):
    """Growth of the resident memory of a spot's process since before its inputs were made: with the weights loaded,
    after the first forward, after the first training step and after the last."""

    kind: Literal["memory"] = "memory"
    number: int
    loaded: int
    packed: int
    first_step: int
    last_step: int


class SpotOtherLoadLine(OtherLoadLine):
    """The share of other programs during the repeats of one spot. number: None in files of earlier versions."""

    number: int | None = None


Line = LayerLine | SpotLine | RepeatLine | MemoryLine | SpotOtherLoadLine


def read(directory: Path) -> list[Line]:
    """The lines of a run, without a last line that was cut off. FileNotFoundError without a file."""
    return read_lines(directory / FILE, Line)
