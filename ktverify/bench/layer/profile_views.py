"""A profile: the shortest call of each range, its tables, joined in a `View`, and its Chrome trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ktverify.bench.layer.profile import READING
from ktverify.bench.layer.profile_record import RANGES, CallLine, Line, ProfileLine, Range
from ktverify.bench.phases import PHASES, STAGE_HEADINGS, stage_note, stage_rows
from ktverify.bench.timed_run import CeilingLine, disturbed, run_pairs
from ktverify.engines.native.phase_times import Phase, StageTimes
from ktverify.report import trace_events
from ktverify.report.grid import Grid
from ktverify.report.numbers import NOTHING, STATISTICS, compared, number, percent, statistics_cells
from ktverify.report.pages import View, statistics_row
from ktverify.system.plausible import Work
from ktverify.system.timing import Ratio, Statistics

# the parallel stages by direction, in the order in which a call passes them; without LoRA the last but one of a
# backward is missing
STAGES: dict[str, tuple[str, ...]] = {
    "forward": ("pack x, x A", "gate + up, silu", "h A", "down, merge"),
    "backward": ("gather dO, dO B", "down grad, silu'", "dg B, du B", "dx, LoRA grads"),
}
# lanes of the trace
PYTHON_LANE = trace_events.FIRST_LANE
FIRST_WORKER = PYTHON_LANE + 1


def stage_name(times: StageTimes, stage: int) -> str:
    """What a stage does."""
    names = STAGES[times.direction]
    if times.stages < len(names):
        names = (*names[: times.stages - 1], names[-1])
    return names[stage]


@dataclass(frozen=True)
class Worker:
    """One worker in one call, ns. busy: in its phases; barrier: from its last task of a stage to the stage's end;
    other: waiting for its turn, and time outside the stages. They add up to the call."""

    busy: int
    barrier: int
    other: int


def worker_of(times: StageTimes, worker: int) -> Worker:
    busy = times.busy_ns(worker)
    barrier = sum(span.end - span.work_end for span in times.spans[worker])
    return Worker(busy, barrier, times.wall_ns - busy - barrier)


def unexplained_ns(times: StageTimes) -> float:
    """Waiting in a call that belongs to no stage, mean over the workers. The phases add up to the call by construction,
    because waiting is what they leave; waiting at a barrier belongs to its stage."""
    return sum(worker_of(times, worker).other for worker in range(times.workers)) / times.workers


@dataclass(frozen=True)
class Imbalance:
    """One stage, ns: by how much its last worker finished after its first, and began after its first."""

    stage: int
    finish: int
    begin: int


def imbalances(times: StageTimes) -> list[Imbalance]:
    """One for every stage of a call; all zero with one worker."""
    found = []
    for stage in range(times.stages):
        ends = [spans[stage].work_end for spans in times.spans]
        begins = [spans[stage].begin for spans in times.spans]
        found.append(Imbalance(stage, max(ends) - min(ends), max(begins) - min(begins)))
    return found


@dataclass(frozen=True)
class RangeSummary:
    """One range. plain, recorded: milliseconds of the steady calls, without and with recording; shortest: the shortest
    recorded call."""

    range: Range
    first: CallLine
    plain: Statistics
    recorded: Statistics
    shortest: CallLine

    @property
    def explained(self) -> float:
        """The sum of the stages of its engine calls and of its other parts, over the time seen from Python."""
        return sum(part.explained_ns for part in self.shortest.parts) / self.shortest.ns


@dataclass(frozen=True)
class ProfileSummary:
    """A whole profile, its ranges in the order of RANGES. warmups: calls of each range between its first and the steady
    ones; read, multiply: the machine's ceilings, the best of several measurements; warning: of a disturbed run."""

    head: ProfileLine
    ranges: tuple[RangeSummary, ...]
    warmups: int
    read: float
    multiply: float
    warning: str

    @classmethod
    def of(cls, lines: Sequence[Line]) -> ProfileSummary | None:
        """None where no range has its first and a steady call; the last range of a stopped run may be missing."""
        head = next((line for line in lines if isinstance(line, ProfileLine)), None)
        ceilings = [line for line in lines if isinstance(line, CeilingLine)]
        calls = [line for line in lines if isinstance(line, CallLine)]
        ranges = tuple(found for name in RANGES if (found := _range(name, calls)) is not None)
        if head is None or not ranges:
            return None
        read, multiply = (max((getattr(line, what) for line in ceilings), default=0.0) for what in ("read", "multiply"))
        warmups = sum(call.which == "warmup" and call.range == ranges[0].range for call in calls)
        return cls(head, ranges, warmups, read, multiply, disturbed(lines))

    def roofline_ns(self, phase: Phase) -> float:
        """The least time of a phase at the machine's ceilings."""
        return 1e9 * Work(phase.bytes, phase.flops).seconds(self.read, self.multiply)


def _range(name: Range, calls: Sequence[CallLine]) -> RangeSummary | None:
    by = {which: [c for c in calls if c.range == name and c.which == which] for which in ("first", "plain", "recorded")}
    if not all(by.values()):
        return None
    shortest = min(by["recorded"], key=lambda call: call.ns)
    plain, recorded = (Statistics.of([call.ns / 1e6 for call in by[which]]) for which in ("plain", "recorded"))
    return RangeSummary(name, by["first"][0], plain, recorded, shortest)


# ---- tables


def view(summary: ProfileSummary, picture: bytes) -> View:
    grids = [ranges_grid(summary)]
    for found in summary.ranges:
        if found.range == "full_train_loop":
            grids.append(parts_grid(found))
        else:
            grids += [phases_grid(summary, found), workers_grid(found.shortest.stages[0])]
    return View("profile", verdict(summary), run_pairs(summary.head), grids, rows(summary), picture, summary.warning)


def verdict(summary: ProfileSummary) -> str:
    """One line: where most of forward and backward goes."""
    texts = []
    for found in summary.ranges[:2]:
        times = found.shortest.stages[0]
        most = max(times.phases, key=lambda phase: phase.wall_ns)
        share = percent(most.wall_ns / times.wall_ns)
        texts.append(f"{times.direction} {number(found.plain.min)} ms, most of it {PHASES[most.name]} ({share})")
    return "; ".join(texts)


def ranges_grid(summary: ProfileSummary) -> Grid:
    """A row for each range: first call, steady calls, the minimum with recording over that without, and what the
    stages leave unexplained: Python's checks and new tensors around the engine, and the time between the parts."""
    rows = [
        {
            "range": one.range,
            "first ms": number(one.first.ns / 1e6),
            **dict(zip(STATISTICS, statistics_cells(one.plain), strict=True)),
            "recorded / plain": compared(Ratio.of(one.recorded, one.plain)),
            "sum of stages / call": percent(one.explained),
            "outside ms": number(one.shortest.ns * (1 - one.explained) / 1e6),
        }
        for one in summary.ranges
    ]
    head = summary.head
    notes = (
        f"ceilings: reading {number(summary.read / 1e9)} GB/s, multiplying {number(summary.multiply / 1e9)} GFLOP/s",
        f"{summary.warmups} warm-ups before {summary.ranges[0].plain.count} steady calls each, recorded and plain in "
        "turn; the stages are those of the shortest recorded call",
    )
    return Grid.of(rows, f"{head.case} on {head.isa}, TP {head.tp}, {head.workers} workers", notes=notes)


def phases_grid(summary: ProfileSummary, found: RangeSummary) -> Grid:
    """The phases of the shortest call beside those of the first, and how near each is to its roofline."""
    times, first = found.shortest.stages[0], found.first.stages[0]
    early = {phase.name: phase.wall_ns for phase in first.phases}
    *texts, total = stage_rows(times, summary.multiply, summary.read)
    lines = []
    for text, phase in zip(texts, times.phases, strict=True):
        least = summary.roofline_ns(phase)
        near = percent(least / phase.wall_ns) if least and phase.wall_ns else NOTHING
        lines.append((*text[:2], number(early.pop(phase.name, 0.0) / 1e6), *text[2:], near))
    # phases of the first call alone come before the sum
    nothing = [NOTHING] * len(STAGE_HEADINGS[1:])
    lines += [(PHASES[name], NOTHING, number(ns / 1e6), *nothing) for name, ns in early.items() if ns]
    near = percent(sum(map(summary.roofline_ns, times.phases)) / times.wall_ns)
    lines.append((*total[:2], number(first.wall_ns / 1e6), *total[2:], near))
    waiting = unexplained_ns(times)
    share = percent(waiting / times.wall_ns)
    note = f"other waiting: {number(waiting / 1e6)} ms, {share} of the call, at no stage's barrier"
    headings = (*STAGE_HEADINGS[:2], "first ms", *STAGE_HEADINGS[2:], "roofline / time")
    return Grid(f"{found.range}: phases", (stage_note(times), note), headings, tuple(lines))


def workers_grid(times: StageTimes) -> Grid:
    """A row for each worker: busy, waiting at barriers, the rest, and its work in each parallel stage."""
    lines = []
    for place, spans in enumerate(times.spans):
        worker = worker_of(times, place)
        spent = [number(ns / 1e6) for ns in (worker.busy, worker.barrier, worker.other)]
        working = [number((span.work_end - span.begin) / 1e6) for span in spans]
        lines.append((f"worker {place}", *spent, percent(worker.busy / times.wall_ns), *working))
    stages = [stage_name(times, stage) for stage in range(times.stages)]
    headings = ("worker", "busy ms", "at barriers ms", "other ms", "busy", *stages)
    notes = (f"{times.stages} stages, a barrier after each", *_imbalance(times))
    return Grid(f"{times.direction}: workers, ms in each stage", notes, headings, tuple(lines))


def _imbalance(times: StageTimes) -> list[str]:
    found = imbalances(times)
    if times.workers < 2 or not found:
        return []
    worst, late = max(found, key=lambda one: one.finish), max(found, key=lambda one: one.begin)
    return [
        f"largest imbalance: {stage_name(times, worst.stage)}, its last worker finishes {number(worst.finish / 1e6)} "
        f"ms after its first, {percent(worst.finish / times.wall_ns)} of the call",
        f"latest arrival: {stage_name(times, late.stage)}, its last worker begins {number(late.begin / 1e6)} ms after "
        f"its first, {percent(late.begin / times.wall_ns)} of the call",
    ]


def _sums(call: CallLine) -> dict[str, int]:
    """Nanoseconds of each part of a call, of the time between them, and of all."""
    sums = Counter[str]()
    for part in call.parts:
        sums[part.name] += part.ns
    return {**sums, "between them": call.ns - sums.total(), "all": call.ns}


def parts_grid(found: RangeSummary) -> Grid:
    """The parts of a training step, as Python sees them."""
    call, early = found.shortest, _sums(found.first)
    engine = {part.name: number(part.stages.wall_ns / 1e6) for part in call.parts if part.stages is not None}
    rows = [
        {
            "part": name,
            "ms": number(ns / 1e6),
            "first ms": number(early.get(name, 0) / 1e6),
            "share": percent(ns / call.ns),
            "in the engine ms": engine.get(name, NOTHING),
        }
        for name, ns in _sums(call).items()
    ]
    note = f"{READING} is the profiler's own: a plain step has none of it"
    return Grid.of(rows, "full_train_loop: parts of a step", notes=(note,))


def rows(summary: ProfileSummary) -> list[dict[str, object]]:
    """A row for each range and pass of calls: milliseconds."""
    about: dict[str, object] = {"case": summary.head.case, "isa": summary.head.isa, "tp": summary.head.tp}
    return [
        {**about, "range": one.range, "calls": which, "unit": "ms", **statistics_row(getattr(one, which))}
        for one in summary.ranges
        for which in ("plain", "recorded")
    ]


# ---- the trace


def trace(lines: Sequence[Line]) -> str:
    """The trace as JSON: all calls in Python's lane, the recorded ones in the workers' lanes too."""
    head = next(line for line in lines if isinstance(line, ProfileLine))
    calls = [line for line in lines if isinstance(line, CallLine)]
    workers = max((times.workers for call in calls for times in call.stages), default=0)
    title = trace_events.title(f"ktverify profile {head.case}, {head.isa}")
    events = [title, *trace_events.lane(PYTHON_LANE, "Python")]
    for worker in range(workers):
        events += trace_events.lane(worker + FIRST_WORKER, f"worker {worker}")
    for call in calls:
        events += _call(call)
    return trace_events.document(events, {"command": head.command, "isa": head.isa})


def _call(call: CallLine) -> Iterator[dict[str, Any]]:
    """Events of a call and its parts in Python's lane, and of its engine calls in the workers' lanes."""
    yield trace_events.span(call.range, call.which, PYTHON_LANE, (call.at, call.ns), {"pass": call.which})
    for part in call.parts:
        if len(call.parts) > 1:
            yield trace_events.span(part.name, "part", PYTHON_LANE, (call.at + part.at, part.ns), {})
        if part.stages is not None:
            yield from _engine(part.stages, call.at + part.at + part.ns)


def _engine(times: StageTimes, end: int) -> Iterator[dict[str, Any]]:
    """Events of an engine call and its workers. The engine does not report when it began. What Python does around it
    (checks, new tensors) comes before it, so the call is drawn at the end of what Python saw."""
    origin = end - times.wall_ns
    ms = {phase.name: round(phase.wall_ns / 1e6, 4) for phase in times.phases}
    yield trace_events.span(f"engine {times.direction}", "engine", PYTHON_LANE, (origin, times.wall_ns), ms)
    for lane, spans in enumerate(times.spans, start=FIRST_WORKER):
        for span in spans:
            name, working = stage_name(times, span.stage), span.work_end - span.begin
            yield trace_events.span(name, "work", lane, (origin + span.begin, working), {"stage": span.stage})
            waiting = (origin + span.work_end, span.end - span.work_end)
            yield trace_events.span("waiting at the barrier", "wait", lane, waiting, {"stage": span.stage})
