"""The tables of a profile, joined in a `View`."""

from __future__ import annotations

from collections import Counter

from ktverify.bench.layer.profile import READING
from ktverify.bench.layer.profile_record import CallLine
from ktverify.bench.layer.profile_summary import (
    ProfileSummary,
    RangeSummary,
    imbalances,
    stage_name,
    unexplained_ns,
    worker_of,
)
from ktverify.bench.tables import PHASES, STAGE_HEADINGS, stage_note, stage_rows
from ktverify.bench.timed_run import run_pairs
from ktverify.engines.native.phase_times import StageTimes
from ktverify.report.grid import Grid
from ktverify.report.numbers import NOTHING, mean_and_std, number, percent
from ktverify.report.pages import View, statistics_row


def view(summary: ProfileSummary, picture: bytes) -> View:
    grids = [ranges_grid(summary)]
    for found in summary.ranges:
        if found.range == "full_train_loop":
            grids.append(parts_grid(found))
        else:
            times, first = found.typical.stages[0], found.first.stages[0]
            grids += [phases_grid(summary, found, times, first), workers_grid(times)]
    return View("profile", verdict(summary), run_pairs(summary.head), grids, rows(summary), picture)


def verdict(summary: ProfileSummary) -> str:
    """One line: where most of forward and backward goes."""
    texts = []
    for found in summary.ranges[:2]:
        times = found.typical.stages[0]
        most = max(times.phases, key=lambda phase: phase.wall_ns)
        share = percent(most.wall_ns / times.wall_ns)
        texts.append(f"{times.direction} {number(found.plain.median)} ms, most of it {PHASES[most.name]} ({share})")
    return "; ".join(texts)


def ranges_grid(summary: ProfileSummary) -> Grid:
    """A row for each range: first call, steady calls, what the stages leave unexplained."""
    found = []
    for one in summary.ranges:
        steady = one.plain
        found.append(
            (
                one.range,
                number(one.first.ns / 1e6),
                mean_and_std(steady),
                *(number(value) for value in (steady.median, steady.min, steady.percentiles[95], steady.max)),
                f"{one.recording_ratio:.3f}",
                percent(one.explained),
                number(one.outside_ns / 1e6),
            )
        )
    head = summary.head
    title = f"{head.case} on {head.isa}, TP {head.tp}, {head.workers} workers"
    steady_headings = ("steady ms", "median", "min", "p95", "max")
    headings = ("range", "first ms", *steady_headings, "recorded / plain", "sum of stages / call", "outside ms")
    notes = (
        *summary.notes,
        f"ceilings: reading {number(summary.read / 1e9)} GB/s, multiplying {number(summary.multiply / 1e9)} GFLOP/s",
        f"{summary.warmups} warm-ups before {summary.ranges[0].plain.count} steady calls each, recorded and plain in "
        "turn; the stages are those of the recorded call of median length",
    )
    return Grid(title, notes, headings, tuple(found))


def phases_grid(summary: ProfileSummary, found: RangeSummary, times: StageTimes, first: StageTimes) -> Grid:
    """The phases of the typical call beside those of the first, and how near each is to its roofline."""
    early = {phase.name: phase.wall_ns for phase in first.phases}
    texts = stage_rows(times, summary.multiply, summary.read)
    lines = []
    for text, phase in zip(texts, times.phases, strict=False):
        least = summary.roofline_ns(phase)
        near = percent(least / phase.wall_ns) if least and phase.wall_ns else NOTHING
        lines.append((text[0], text[1], number(early.pop(phase.name, 0.0) / 1e6), *text[2:], near))
    # phases of the first call alone come before the sum
    nothing = [NOTHING] * len(STAGE_HEADINGS[2:])
    lines += [(PHASES[name], NOTHING, number(ns / 1e6), *nothing, NOTHING) for name, ns in early.items() if ns]
    total, least = texts[-1], sum(map(summary.roofline_ns, times.phases))
    lines.append((total[0], total[1], number(first.wall_ns / 1e6), *total[2:], percent(least / times.wall_ns)))
    headings = (*STAGE_HEADINGS[:2], "first ms", *STAGE_HEADINGS[2:], "roofline / time")
    return Grid(f"{found.range}: phases", (stage_note(times), _unexplained(times)), headings, tuple(lines))


def _unexplained(times: StageTimes) -> str:
    ns = unexplained_ns(times)
    return f"other waiting: {number(ns / 1e6)} ms, {percent(ns / times.wall_ns)} of the call, at no stage's barrier"


def workers_grid(times: StageTimes) -> Grid:
    """A row for each worker: busy, waiting at barriers, the rest, and its work in each parallel stage."""
    lines = []
    for number_, spans in enumerate(times.spans):
        worker = worker_of(times, number_)
        working = [number((span.work_end - span.begin) / 1e6) for span in spans]
        spent = (worker.busy, worker.barrier, worker.other)
        shares = percent(worker.busy / times.wall_ns)
        lines.append((f"worker {number_}", *(number(ns / 1e6) for ns in spent), shares, *working))
    stages = [stage_name(times, stage) for stage in range(times.stages)]
    headings = ("worker", "busy ms", "at barriers ms", "other ms", "busy", *stages)
    notes = (f"{times.stages} stages, a barrier after each", *_imbalance(times))
    return Grid(f"{times.direction}: workers, ms in each stage", notes, headings, tuple(lines))


def _imbalance(times: StageTimes) -> list[str]:
    found = imbalances(times)
    if times.workers < 2 or not found:
        return []
    worst = max(found, key=lambda one: one.finish)
    late = max(found, key=lambda one: one.begin)
    shares = (percent(ns / times.wall_ns) for ns in (worst.finish, late.begin))
    return [
        f"largest imbalance: {stage_name(times, worst.stage)}, its last worker finishes {number(worst.finish / 1e6)} "
        f"ms after its first, {next(shares)} of the call",
        f"latest arrival: {stage_name(times, late.stage)}, its last worker begins {number(late.begin / 1e6)} ms after "
        f"its first, {next(shares)} of the call",
    ]


def _sums(call: CallLine) -> dict[str, int]:
    """Nanoseconds of each part of a call, of the time between them, and of all."""
    sums = Counter[str]()
    for part in call.parts:
        sums[part.name] += part.ns
    return {**sums, "between them": call.ns - sums.total(), "all": call.ns}


def parts_grid(found: RangeSummary) -> Grid:
    """The parts of a training step, as Python sees them."""
    call, first = found.typical, found.first
    engine = Counter[str]()
    for part in call.parts:
        engine[part.name] += part.stages.wall_ns if part.stages is not None else 0
    now, early = _sums(call), _sums(first)
    lines = [
        (name, *(number(sums.get(name, 0) / 1e6) for sums in (now, early)), percent(now[name] / call.ns), inside)
        for name in now
        for inside in (number(engine[name] / 1e6) if engine[name] else NOTHING,)
    ]
    note = f"{READING} is the profiler's own: a plain step has none of it"
    return Grid(
        "full_train_loop: parts of a step",
        (note,),
        ("part", "ms", "first ms", "share", "in the engine ms"),
        tuple(lines),
    )


def rows(summary: ProfileSummary) -> list[dict[str, object]]:
    """A row for each range and pass of calls: milliseconds."""
    about: dict[str, object] = {"case": summary.head.case, "isa": summary.head.isa, "tp": summary.head.tp}
    return [
        {**about, "range": one.range, "calls": which, "unit": "ms", **statistics_row(getattr(one, which))}
        for one in summary.ranges
        for which in ("plain", "recorded")
    ]
