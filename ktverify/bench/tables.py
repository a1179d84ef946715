"""Tables of a bench run: cells as text, for the console and for Markdown.

Comes in: summaries. Goes out: headings and rows of text; `markdown` joins them, `console` prints them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ktverify.bench.engines import OWN
from ktverify.bench.record import HeadLine
from ktverify.bench.summary import EngineSummary, Roofline, ShapeSummary, Spread, Timing
from ktverify.engines.native.phase_times import StageTimes
from ktverify.spec.cases import Case
from ktverify.system.machine import format_bytes
from ktverify.system.other_load import BUSY

NOTHING = "–"


@dataclass(frozen=True)
class Grid:
    """A table: a title line, notes below it, headings and rows. The first column is text, the others numbers."""

    title: str
    notes: tuple[str, ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def number(value: float) -> str:
    """Three significant digits, whole from 100 on."""
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def verdict(summaries: Sequence[ShapeSummary]) -> str:
    """One line: the native engine over the roofline, the median of the shapes that were timed."""
    texts = []
    for what in ("forward", "backward"):
        timings = [getattr(own, what) for one in summaries if (own := one.engine(OWN)) is not None]
        overs = [timing.over_roofline.median for timing in timings if timing and timing.over_roofline]
        if overs:
            texts.append(f"{what} {statistics.median(overs):.2f} times the roofline")
    return ", ".join(texts) or "the native engine was not timed"


def shape_grid(summary: ShapeSummary, *, told: bool = False) -> Grid:
    """One shape: a row for each engine; `told`: problems among its notes."""
    case = Case.parse(summary.shape.case)
    run = f", run {summary.run}" if summary.run > 1 else ""
    routing = "" if case.routing == "uniform" else f" {case.routing}"
    title = (
        f"{summary.shape.shape}{run}: E{case.num_experts} k{case.top_k} H{case.hidden} I{case.intermediate} "
        f"T{case.qlen} r{case.rank}{routing}"
    )
    notes = [
        f"{summary.shape.active} of {case.num_experts} experts active, "
        f"{format_bytes(summary.shape.weight_bytes)} of bf16 weights"
    ]
    if summary.read is not None and summary.multiply is not None:
        notes.append(
            f"ceilings: reading {_between(summary.read, 1e-9)} GB/s, "
            f"multiplying {_between(summary.multiply, 1e-9)} GFLOP/s ({summary.isa})"
        )
        notes.append(f"roofline: forward {_bound(summary.forward)}, backward {_bound(summary.backward)}")
    notes += [*warnings(summary), *(problems(summary) if told else [])]
    headings = (
        "engine",
        "forward ms",
        "quartiles",
        "x roofline",
        "x native",
        "saving ms",
        "backward ms",
        "quartiles",
        "x roofline",
        "x native",
        "bwd / fwd",
        "memory",
        "rel_l2 out",
        "rel_l2 grad",
    )
    return Grid(title, tuple(notes), headings, tuple(_engine_row(summary, engine) for engine in summary.engines))


# what people call the engine's phases; ktverify/engines/native/phase_times.py has the engine's own names
PHASES = {
    "routing": "routing",
    "allocation": "buffers",
    "pack_weights": "pack weights",
    "pack_input": "pack input",
    "gate_up_lora_a": "gate, up: x A",
    "gate_up": "gate + up (+ LoRA B)",
    "activation": "activation",
    "down_lora_a": "down: h A",
    "down": "down (+ LoRA B)",
    "merge": "merge",
    "scatter": "scatter",
    "down_lora_b": "down: dO B",
    "down_grad": "down grad (+ LoRA A)",
    "activation_grad": "activation grad",
    "gate_up_lora_b": "gate, up: dg B, du B",
    "gate_up_grad": "gate + up grad (+ LoRA A)",
    "gate_up_lora_grad": "gate, up LoRA grads",
    "down_lora_grad": "down LoRA grads",
    "routing_grad": "routing grad",
    "wait": "waiting",
}


def stage_grids(summary: ShapeSummary) -> list[Grid]:
    """Where the native engine's time goes, forward and backward: a row for each phase, and their sum."""
    run = f", run {summary.run}" if summary.run > 1 else ""
    multiply = summary.multiply.median if summary.multiply is not None else 0.0
    read = summary.read.median if summary.read is not None else 0.0
    return [
        Grid(
            f"{summary.shape.shape}{run}: where the native engine's {times.direction} goes",
            (stage_note(times),),
            STAGE_HEADINGS,
            tuple(stage_rows(times, multiply, read)),
        )
        for times in summary.stages
    ]


STAGE_HEADINGS = ("phase", "ms", "share", "GFLOP/s", "of ceiling", "GB/s", "of ceiling")


def stage_note(times: StageTimes) -> str:
    """How many barriers a call has, and how busy its idlest and its busiest worker are."""
    share = [times.busy_ns(worker) / times.wall_ns for worker in range(times.workers)]
    note = f"{times.stages} parallel stages, {times.workers} workers, busy {min(share):.0%} to {max(share):.0%}"
    return note.replace("%", " %")


def stage_rows(times: StageTimes, multiply: float, read: float) -> list[tuple[str, ...]]:
    """A row of STAGE_HEADINGS for each phase, and one for all. multiply, read: ceilings per second, 0: not known."""
    rows = [
        _stage_row(PHASES[phase.name], phase.wall_ns, times.wall_ns, phase.flops, phase.bytes, multiply, read)
        for phase in times.phases
    ]
    total = (sum(phase.flops for phase in times.phases), sum(phase.bytes for phase in times.phases))
    rows.append(_stage_row("all", times.wall_ns, times.wall_ns, *total, multiply, read))
    return rows


def _stage_row(
    name: str, ns: float, wall_ns: float, flops: float, bytes_: float, multiply: float, read: float
) -> tuple[str, ...]:
    """One phase: its part of the wall time, and its rates (operations and bytes per ns are GFLOP/s and GB/s)."""

    def rate(amount: float, ceiling: float) -> tuple[str, str]:
        if amount == 0 or ns == 0:
            return NOTHING, NOTHING
        share = f"{100 * 1e9 * amount / ns / ceiling:.0f} %" if ceiling else NOTHING
        return number(amount / ns), share

    return (name, number(ns / 1e6), f"{100 * ns / wall_ns:.1f} %", *rate(flops, multiply), *rate(bytes_, read))


def overview_grid(summaries: Sequence[ShapeSummary], what: str) -> Grid:
    """All shapes, forward or backward: the native engine's median, and how many times longer each peer takes."""
    names: dict[str, str] = {}
    for summary in summaries:
        for engine in summary.engines:
            names.setdefault(engine.line.engine, engine.line.title + ("" if engine.line.lora else " (no LoRA)"))
    peers = [name for name in names if name != OWN]
    rows = []
    for summary in summaries:
        own = summary.engine(OWN)
        timing: Timing | None = getattr(own, what) if own is not None else None
        roofline: Roofline | None = getattr(summary, what)
        label = summary.shape.shape + (f" #{summary.run}" if summary.run > 1 else "")
        cells = [
            label,
            number(roofline.ms.median) if roofline is not None else NOTHING,
            number(timing.ms.median) if timing is not None else _word(own, what),
            _median(timing.over_roofline if timing is not None else None),
        ]
        for name in peers:
            peer = summary.engine(name)
            ratio = None if peer is None else getattr(peer, what)
            cells.append(_median(ratio.against_own) if ratio is not None else _word(peer, what))
        rows.append(tuple(cells))
    headings = ("shape", "roofline ms", "native ms", "x roofline", *(f"{names[name]} / native" for name in peers))
    return Grid(what, (), headings, tuple(rows))


def problems(summary: ShapeSummary) -> list[str]:
    """A line for each engine that was not timed, or not wholly: which, and why."""
    lines = []
    for engine in summary.engines:
        if engine.line.reason:
            verdict = engine.line.forward if engine.line.forward != "PASS" else engine.line.backward
            lines.append(f"{verdict} {engine.line.title}: {engine.line.reason}")
    return lines


def warnings(summary: ShapeSummary) -> list[str]:
    """What makes the times of this shape less than they seem."""
    found = []
    if summary.others >= BUSY:
        left = f"{summary.left_out} of {summary.turns} turns were disturbed and do not count"
        if not summary.left_out:
            left = "too few turns were quiet to count those alone, so all do"
        found.append(f"other programs had {100 * summary.others:.0f} % of the processors; {left}")
    if summary.restless:
        found.append(f"{', '.join(summary.restless)} kept computing between turns, at the others' expense")
    if summary.groups > 1:
        found.append("too large for all engines at once: each peer was measured with the native engine alone")
    return found


def head_pairs(head: HeadLine) -> list[tuple[str, str]]:
    """(name, value) lines about the run."""
    versions = ", ".join(f"{name} {version}" for name, version in head.machine.versions.items() if name != "compiler")
    forced = f", all held to {head.isa}" if head.isa else ""
    return [
        ("run", f"{head.stamp}, {head.commit or 'no checkout'}"),
        ("machine", f"{head.machine.cpu}, {head.threads} threads, {format_bytes(head.machine.memory_bytes)}{forced}"),
        ("versions", versions),
        ("method", f"{head.rounds} interleaved rounds after {head.warmup} to warm up; medians, ratios round by round"),
        ("command", head.command),
    ]


def grid_markdown(grid: Grid) -> str:
    """Heading, notes, table."""
    from tabulate import tabulate

    align = ("left", *["right"] * (len(grid.headings) - 1))
    parts = [f"## {grid.title}", *(["\n".join(f"- {note}" for note in grid.notes)] if grid.notes else [])]
    table = tabulate(grid.rows, grid.headings, tablefmt="github", colalign=align, disable_numparse=True)
    return "\n\n".join([*parts, table if grid.rows else "nothing was measured"])


def markdown(head: HeadLine | None, summaries: Sequence[ShapeSummary]) -> str:
    """The whole run as a page."""
    parts = ["# Bench"]
    if head is not None:
        parts.append("\n".join(f"- {name}: {value}" for name, value in head_pairs(head)))
    grids = [overview_grid(summaries, what) for what in ("forward", "backward")] if summaries else []
    shapes = [grid for summary in summaries for grid in (shape_grid(summary), *stage_grids(summary))]
    for grid in [*grids, *shapes]:
        parts.append(grid_markdown(grid))
        matching = [s for s in summaries if shape_grid(s).title == grid.title]
        lines = [f"- {line}" for summary in matching for line in problems(summary)]
        parts += ["\n".join(lines)] if lines else []
    parts.append(LEGEND)
    return "\n\n".join(parts) + "\n"


def rows(summaries: Sequence[ShapeSummary]) -> list[dict[str, object]]:
    """A row for each shape, engine and kind of call that was timed: milliseconds and ratios."""
    found: list[dict[str, object]] = []
    for summary in summaries:
        for engine in summary.engines:
            for what in ("forward", "forward_saving", "backward"):
                timing: Timing | None = getattr(engine, what)
                if timing is None:
                    continue
                over, against = timing.over_roofline, timing.against_own
                row = {"shape": summary.shape.shape, "run": summary.run, "engine": engine.line.engine, "what": what}
                spread = {"count": timing.ms.count, "median": timing.ms.median, "p25": timing.ms.low}
                ratios = {"x_roofline": over.median if over else "", "x_native": against.median if against else ""}
                found.append({**row, "unit": "ms", **spread, "p75": timing.ms.high, **ratios})
    return found


LEGEND = (
    "forward: nothing kept; saving: forward that keeps what backward needs; x roofline: over the time that the "
    "machine's ceilings allow; x native: over the native engine's time; memory: growth by loading over the bf16 "
    "weights; rel_l2: against the fp32 oracle, of the gradients the worst"
)


def _engine_row(summary: ShapeSummary, engine: EngineSummary) -> tuple[str, ...]:
    title = engine.line.title + ("" if engine.line.lora else " (no LoRA)")
    own = engine.line.engine == OWN
    cells = [title]
    for what in ("forward", "backward"):
        timing: Timing | None = getattr(engine, what)
        if timing is None:
            cells += [engine.verdict(what), NOTHING, NOTHING, NOTHING]
        else:
            against = NOTHING if own else _median(timing.against_own)
            cells += [number(timing.ms.median), _quartiles(timing.ms), _median(timing.over_roofline), against]
        if what == "forward":
            saving = engine.forward_saving
            cells.append(number(saving.ms.median) if saving is not None else NOTHING)
    resident = summary.resident(engine)
    return (
        *cells,
        _median(engine.backward_over_forward),
        f"{resident:.2f}" if resident is not None else NOTHING,
        _error(engine.output_error),
        _error(engine.gradient_error),
    )


def _word(engine: EngineSummary | None, what: str) -> str:
    """Why there is no time: the verdict, or nothing where this is no part of the engine."""
    if engine is None:
        return NOTHING
    verdict = engine.verdict(what)
    return NOTHING if verdict in ("UNSUPPORTED", "PASS") else verdict


def _median(value: Spread | None) -> str:
    return NOTHING if value is None else f"{value.median:.2f}"


def _quartiles(value: Spread) -> str:
    return f"{number(value.low)}–{number(value.high)}"


def _between(value: Spread, unit: float) -> str:
    return f"{number(value.median * unit)} ({number(value.low * unit)}–{number(value.high * unit)})"


def _bound(roofline: Roofline | None) -> str:
    return NOTHING if roofline is None else f"{number(roofline.ms.median)} ms ({roofline.bound})"


def _error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}".replace("e-0", "e-")
