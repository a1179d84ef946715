"""A profile as tables: cells as text, for the console and for Markdown.

Comes in: the head line and summaries. Goes out: `Grid`s of bench/tables.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from ktverify.bench.quiet import BUSY
from ktverify.bench.tables import NOTHING, PHASES, STAGE_HEADINGS, Grid, number, stage_note, stage_rows
from ktverify.profile.record import ProfileLine
from ktverify.profile.summary import RangeSummary, roofline_ns, stage_name
from ktverify.stages import WAIT, StageTimes


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def verdict(summaries: Sequence[RangeSummary]) -> str:
    """One line: where most of a training step's two halves goes."""
    parts = []
    for summary in summaries[:2]:
        times = summary.typical.stages[0]
        most = max(times.phases, key=lambda phase: phase.wall_ns)
        share = percent(most.wall_ns / times.wall_ns)
        parts.append(f"{times.direction} {number(summary.plain.median)} ms, most of it {PHASES[most.name]} ({share})")
    return "; ".join(parts)


def ranges_grid(head: ProfileLine, summaries: Sequence[RangeSummary], others: float = 0.0) -> Grid:
    """A row for each range: first call, steady calls, what the stages leave unexplained. others: of QuietLine."""
    rows = []
    for summary in summaries:
        steady, typical = summary.plain, summary.typical
        outside = (typical.ns - typical.engine_ns) / 1e6
        rows.append(
            (
                summary.range,
                number(summary.first.ns / 1e6),
                f"{number(steady.mean)} ± {number(steady.std)}",
                *(number(value) for value in (steady.median, steady.min, steady.percentiles[95], steady.max)),
                f"{summary.recording_ratio:.3f}",
                percent(summary.stages_share),
                number(outside),
            )
        )
    title = f"{head.case} on {head.isa}, TP {head.tp}, {head.workers} workers"
    headings = (
        "range",
        "first ms",
        "steady ms",
        "median",
        "min",
        "p95",
        "max",
        "recorded / plain",
        "stages / call",
        "outside ms",
    )
    notes = [
        f"ceilings: reading {number(head.read / 1e9)} GB/s, multiplying {number(head.multiply / 1e9)} GFLOP/s",
        f"{summaries[0].plain.count} steady calls each, recorded and plain in turn" if summaries else "stopped early",
    ]
    if others >= BUSY:
        notes.insert(0, f"other programs had {100 * others:.0f} % of the processors: these times mean little")
    return Grid(title, tuple(notes), headings, tuple(rows))


def stage_grids(head: ProfileLine, summaries: Sequence[RangeSummary]) -> list[Grid]:
    """Of forward_only and backward_only: the phases of the typical call, beside those of the first, and its workers."""
    grids = []
    for summary in summaries:
        if summary.range == "full_train_loop":
            continue
        times, first = summary.typical.stages[0], summary.first.stages[0]
        grids += [_phases(head, summary, times, first), _workers(times)]
    return grids


def _phases(head: ProfileLine, summary: RangeSummary, times: StageTimes, first: StageTimes) -> Grid:
    early = {phase.name: phase.wall_ns for phase in first.phases}
    rows = stage_rows(times, head.multiply, head.read)
    least = [roofline_ns(phase, head.read, head.multiply) for phase in times.phases]
    found = []
    phases = [*times.phases, None]
    for row, phase, bound in zip(rows, phases, [*least, sum(least)], strict=True):
        taken = phase.wall_ns if phase is not None else times.wall_ns
        before = early.pop(phase.name, 0.0) if phase is not None else first.wall_ns
        near = percent(bound / taken) if bound and taken else NOTHING
        found.append((row[0], row[1], number(before / 1e6), *row[2:], near))
    # what only the first call does stands above the sum
    only_first = [(PHASES[name], NOTHING, number(ns / 1e6), *[NOTHING] * 6) for name, ns in early.items() if ns]
    headings = (STAGE_HEADINGS[0], STAGE_HEADINGS[1], "first ms", *STAGE_HEADINGS[2:], "roofline / time")
    title = f"{summary.range}: phases of the call of median length"
    return Grid(title, (stage_note(times),), headings, (*found[:-1], *only_first, found[-1]))


def _workers(times: StageTimes) -> Grid:
    """A row for each worker: busy, waiting, and its work in each parallel stage."""
    rows = []
    for worker, spans in enumerate(times.spans):
        wait = next((phase.ns[worker] for phase in times.phases if phase.name == WAIT), 0)
        working = [number((span.work_end - span.begin) / 1e6) for span in spans]
        rows.append(
            (
                f"worker {worker}",
                number(times.busy_ns(worker) / 1e6),
                number(wait / 1e6),
                percent(times.busy_ns(worker) / times.wall_ns),
                *working,
            )
        )
    stages = [stage_name(times, stage) for stage in range(times.stages)]
    notes = [f"a barrier behind each of {times.stages} stages", *_imbalance(times)]
    headings = ("worker", "busy ms", "waiting ms", "busy", *stages)
    return Grid(f"{times.direction}: workers, ms in each stage", tuple(notes), headings, tuple(rows))


def _imbalance(times: StageTimes) -> list[str]:
    """The stage in which the workers' work differs most, over the call's time."""
    if times.workers < 2 or not times.stages:
        return []
    spread = []
    for stage in range(times.stages):
        ends = [spans[stage].work_end for spans in times.spans]
        spread.append((max(ends) - min(ends), stage))
    worst, stage = max(spread)
    share = percent(worst / times.wall_ns)
    return [f"largest imbalance: {stage_name(times, stage)}, {number(worst / 1e6)} ms, {share} of the call"]


def head_pairs(head: ProfileLine) -> list[tuple[str, str]]:
    """(name, value) lines about the run."""
    versions = ", ".join(f"{name} {version}" for name, version in head.machine.versions.items() if name != "compiler")
    return [
        ("run", f"{head.stamp}, {head.commit or 'no checkout'}"),
        ("machine", f"{head.machine.cpu}, {head.machine.threads} threads"),
        ("versions", versions),
        ("command", head.command),
    ]


def markdown(head: ProfileLine, summaries: Sequence[RangeSummary], others: float = 0.0) -> str:
    """The whole profile as a page."""
    from ktverify.bench.tables import grid_markdown

    parts = ["# Profile", verdict(summaries), "\n".join(f"- {name}: {value}" for name, value in head_pairs(head))]
    grids = [ranges_grid(head, summaries, others), *stage_grids(head, summaries)]
    return "\n\n".join([*parts, *(grid_markdown(grid) for grid in grids)]) + "\n"
