"""Where one call of the native engine spent its time.

Comes in: what `_native.Layer.stage_times()` gives. Goes out: `StageTimes`. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

WAIT = "wait"


@dataclass(frozen=True)
class Phase:
    """One kind of work. ns: time of each worker; flops, bytes: what the call's phase computes and at least reads,
    without padding."""

    name: str
    ns: tuple[int, ...]
    flops: float
    bytes: float

    @property
    def wall_ns(self) -> float:
        """Its part of the call's wall time: the mean over the workers, for each worker's phases add up to it."""
        return sum(self.ns) / len(self.ns)


@dataclass(frozen=True)
class Span:
    """One worker in one parallel stage, ns since the call began; from work_end to end it waited at the barrier."""

    stage: int
    begin: int
    work_end: int
    end: int


@dataclass(frozen=True)
class StageTimes:
    """One call. rows: T; phases: in the order in which a call passes them, waiting last; spans: by worker."""

    direction: Literal["forward", "backward"]
    rows: int
    workers: int
    stages: int
    wall_ns: int
    phases: tuple[Phase, ...]
    spans: tuple[tuple[Span, ...], ...]

    @classmethod
    def of(cls, found: dict[str, Any]) -> StageTimes:
        """From the engine's own dict, or from the JSON of `dataclasses.asdict`."""
        phases = (Phase(row["name"], tuple(row["ns"]), row["flops"], row["bytes"]) for row in found["phases"])
        return cls(
            direction=found["direction"],
            rows=found["rows"],
            workers=found["workers"],
            stages=found["stages"],
            wall_ns=found["wall_ns"],
            phases=tuple(phases),
            spans=tuple(tuple(Span(**span) for span in worker) for worker in found["spans"]),
        )

    def busy_ns(self, worker: int) -> int:
        """What a worker worked, waiting left out."""
        return sum(phase.ns[worker] for phase in self.phases if phase.name != WAIT)
