"""Summarise what was measured at each spot of `bench layer` and `bench sweep`. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ktverify.bench.layer.record import (
    LayerLine,
    Line,
    MemoryLine,
    RepeatLine,
    Spot,
    SpotLine,
    SpotOtherLoadLine,
    Varied,
)
from ktverify.spec.cases import Case
from ktverify.system.timing import Statistics

FORWARD, BOTH, SAVING, BACKWARD, DIFFERENCE = (
    "forward",
    "forward + backward",
    "forward that saves",
    "backward",
    "backward by difference",
)
# what is timed or follows, from one repeat; nanoseconds
WHATS: dict[str, Callable[[RepeatLine], int]] = {
    FORWARD: lambda line: line.forward_ns,
    BOTH: lambda line: line.both_ns,
    SAVING: lambda line: line.saving_ns,
    BACKWARD: lambda line: line.backward_ns,
    DIFFERENCE: lambda line: line.both_ns - line.saving_ns,
}
# what is varied, in words
TITLES = {"tp": "TP", "qlen": "qlen", "rank": "LoRA rank", "threads": "workers", "experts": "experts"}


@dataclass(frozen=True)
class SpotSummary:
    """One spot. ms: by WHATS, of the repeats that count; memory: None where the run was stopped before it was measured;
    others: the share of the processors that other programs had meanwhile, 0 to 1."""

    spot: Spot
    found: SpotLine
    ms: dict[str, Statistics]
    memory: MemoryLine | None
    others: float = 0.0

    @property
    def name(self) -> str:
        """A name that no other spot of the run has."""
        if self.spot.varied == "throughput":
            return f"batch {self.spot.batch} x {self.case.qlen // self.spot.batch}"
        return f"{TITLES[self.spot.varied]} {self.spot.value}"

    @property
    def case(self) -> Case:
        return Case.parse(self.spot.case)

    def tokens_per_s(self, what: str) -> float:
        """At the median."""
        return self.case.qlen / (self.ms[what].median / 1e3)


def summarise(lines: Sequence[Line]) -> list[SpotSummary]:
    """One for each spot that has a repeat that counts, in order."""
    head = next((line for line in lines if isinstance(line, LayerLine)), None)
    summaries = []
    for spot in head.spots if head is not None else ():
        repeats = [x for x in lines if isinstance(x, RepeatLine) and x.number == spot.number and x.repeat >= 0]
        found = [x for x in lines if isinstance(x, SpotLine) and x.number == spot.number]
        memory = [x for x in lines if isinstance(x, MemoryLine) and x.number == spot.number]
        quiet = [x.others for x in lines if isinstance(x, SpotOtherLoadLine) and x.number in (spot.number, None)]
        others = max(quiet, default=0.0)
        if repeats and found:
            ms = {what: Statistics.of([of(line) / 1e6 for line in repeats]) for what, of in WHATS.items()}
            summaries.append(SpotSummary(spot, found[0], ms, memory[0] if memory else None, others))
    return summaries


def of(summaries: Sequence[SpotSummary], varied: Varied) -> list[SpotSummary]:
    return [summary for summary in summaries if summary.spot.varied == varied]
