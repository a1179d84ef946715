"""Where one call of the native engine spent its time. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

WAIT = "wait"


@dataclass(frozen=True)
class Phase:
    """One kind of work. ns: time of each worker; flops, bytes: its operations and a lower bound of its reads, without
    padding."""

    name: str
    ns: tuple[int, ...]
    flops: float
    bytes: float

    @property
    def wall_ns(self) -> float:
        """Its share of the call's wall time: the mean over the workers, whose phases each add up to the wall time."""
        return sum(self.ns) / len(self.ns)


@dataclass(frozen=True)
class Span:
    """One worker in one parallel stage, ns since the call began; it waits at the barrier from work_end to end."""

    stage: int
    begin: int
    work_end: int
    end: int


@dataclass(frozen=True)
class StageTimes:
    """One call. rows: T; phases: in the order of the call, waiting last; spans: by worker."""

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
        phases = tuple(Phase(**{**phase, "ns": tuple(phase["ns"])}) for phase in found["phases"])
        spans = tuple(tuple(Span(**span) for span in worker) for worker in found["spans"])
        return cls(**{**found, "phases": phases, "spans": spans})

    def busy_ns(self, worker: int) -> int:
        """The time that a worker worked, without waiting."""
        return sum(phase.ns[worker] for phase in self.phases if phase.name != WAIT)
