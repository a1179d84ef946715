"""A run of `bench shapes`: its tables and its picture, how many times the roofline each engine takes, in a `View`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ktverify.bench.engines import OWN
from ktverify.bench.phases import STAGE_HEADINGS, stage_note, stage_rows
from ktverify.bench.record import HeadLine
from ktverify.bench.summary import EngineSummary, EngineTiming, Roofline, ShapeSummary
from ktverify.bench.timed_run import busy, run_pairs
from ktverify.report import style
from ktverify.report.grid import Grid
from ktverify.report.numbers import (
    LOWEST,
    NOTHING,
    TOO_NOISY,
    compared,
    error,
    lowest_cells,
    many,
    number,
    percent,
    ratio,
)
from ktverify.report.pages import View
from ktverify.report.style import INK, bare, beside, label_x, legend, png
from ktverify.spec.cases import Case
from ktverify.spec.names import OUTPUT
from ktverify.system.limits import format_bytes
from ktverify.system.timing import BUSY, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIRECTIONS = ("forward", "backward")
LEGEND = (
    "forward: nothing is saved; saving: a forward that saves what backward needs; x roofline: over the time that the "
    "machine's ceilings allow, with the engine's bytes of base weights; x native: over the native engine's time; all "
    "ratios are of minima; "
    f"{TOO_NOISY}: the difference is smaller than the spread between rounds, which is the larger 10th percentile over "
    "its minimum; memory: growth by loading over the bf16 weights; rel_l2: against the fp32 oracle, of the gradients "
    "the worst"
)
COLOURS = {
    OWN: style.PURPLE,
    "kt_kernel": style.ORANGE,
    "torch_loop": style.BLUE,
    "torch_grouped_mm": style.GREEN,
    "vllm": style.BROWN,
}
_OTHERS = (style.RED, style.SLATE, style.TEAL)
_LANE = 0.25  # inches of height for one engine at one shape
_TICKS = (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000)


def view(head: HeadLine | None, summaries: Sequence[ShapeSummary]) -> View:
    """The whole run: two overviews, then for each shape its engines and the native engine's phases."""
    grids = [overview_grid(summaries, what) for what in DIRECTIONS] if summaries else []
    shapes = [grid for summary in summaries for grid in shown_grids(summary, stages=True)]
    facts = [*(head_pairs(head) if head is not None else []), *([("columns", LEGEND)] if summaries else [])]
    warning = disturbed(summaries)
    picture = draw(summaries, warning)
    return View("bench", verdict(summaries), facts, [*grids, *shapes], rows(summaries), picture, warning)


def disturbed(summaries: Sequence[ShapeSummary]) -> str:
    """A note that names the shapes whose disturbed turns had to count; "" where there is none."""
    bad = [one for one in summaries if one.others >= BUSY and not one.left_out]
    where = f" at {', '.join(map(_name, bad))}" if len(bad) < len(summaries) else ""
    return busy((one.others for one in bad), where)


def verdict(summaries: Sequence[ShapeSummary]) -> str:
    """One line: the native engine's minimum over the roofline's, median of the shapes that were timed."""
    texts = []
    for what in DIRECTIONS:
        timings = [own.timings.get(what) for one in summaries if (own := one.engine(OWN)) is not None]
        overs = [timing.over_roofline.value for timing in timings if timing and timing.over_roofline]
        if overs:
            texts.append(f"{what} {statistics.median(overs):.2f} times the roofline")
    return f"{', '.join(texts)} (minima)" if texts else "the native engine was not timed"


def shown_grids(summary: ShapeSummary, *, stages: bool) -> list[Grid]:
    """One shape's table; with `stages` also those of the native engine's phases."""
    return [shape_grid(summary), *(stage_grids(summary) if stages else [])]


def _name(summary: ShapeSummary, mark: str = ", run ") -> str:
    return summary.shape.shape + (f"{mark}{summary.run}" if summary.run > 1 else "")


def engine_title(engine: EngineSummary) -> str:
    return engine.line.title + ("" if engine.line.lora else " (no LoRA)")


def shape_grid(summary: ShapeSummary) -> Grid:
    """One shape: a row for each engine; the notes say what limits it, and which engines were not timed and why."""
    case = Case.parse(summary.shape.case)
    routing = "" if case.routing == "uniform" else f" {case.routing}"
    title = (
        f"{_name(summary)}: E{case.num_experts} k{case.top_k} H{case.hidden} I{case.intermediate} "
        f"T{case.qlen} r{case.rank}{routing}"
    )
    notes = [
        f"{summary.shape.active} of {case.num_experts} experts active, "
        f"{format_bytes(summary.shape.weight_bytes)} of bf16 weights"
    ]
    if summary.read is not None and summary.multiply is not None:
        notes.append(
            f"ceilings: reading {_best(summary.read, 1e-9)} GB/s, "
            f"multiplying {_best(summary.multiply, 1e-9)} GFLOP/s ({summary.isa})"
        )
        rooflines = [f"{what} {_bound(summary.rooflines.get(what))}" for what in DIRECTIONS]
        notes.append(f"roofline: {', '.join(rooflines)}")
    more, both = (*LOWEST[1:], "x roofline", "x native"), ("bwd / fwd", "memory", "rel_l2 out", "rel_l2 grad")
    headings = ("engine", "forward min ms", *more, "saving min ms", "backward min ms", *more, *both)
    cells = tuple(_engine_row(summary, engine) for engine in summary.engines)
    return Grid(title, (*notes, *warnings(summary), *problems(summary)), headings, cells)


def _engine_row(summary: ShapeSummary, engine: EngineSummary) -> tuple[str, ...]:
    own = engine.line.engine == OWN
    cells = [engine_title(engine)]
    for what in DIRECTIONS:
        timing = engine.timings.get(what)
        if timing is None:
            cells += [engine.verdict(what), *[NOTHING] * 4]
        else:
            against = NOTHING if own else compared(timing.against_own)
            cells += [*lowest_cells(timing.ms), _over(timing), against]
        if what == "forward":
            saving = engine.timings.get("forward_saving")
            cells.append(number(saving.ms.min) if saving is not None else NOTHING)
    line = engine.line
    resident = ratio(line.resident / summary.shape.weight_bytes) if line.resident else NOTHING
    gradients = [value for name, value in line.rel_l2.items() if name != OUTPUT]
    errors = (line.rel_l2.get(OUTPUT), max(gradients, default=None))
    texts = (NOTHING if found is None else error(found, 1) for found in errors)
    return (*cells, compared(engine.backward_over_forward), resident, *texts)


def problems(summary: ShapeSummary) -> list[str]:
    """A line for each engine that was not timed, or only in part: which, and why."""
    lines = [engine.line for engine in summary.engines if engine.line.reason]
    verdicts = [line.forward if line.forward != "PASS" else line.backward for line in lines]
    return [f"{word} {line.title}: {line.reason}" for word, line in zip(verdicts, lines, strict=True)]


def warnings(summary: ShapeSummary) -> list[str]:
    """What makes the times of this shape less reliable."""
    found = []
    if summary.others >= BUSY:
        left = f"{summary.left_out} of {summary.turns} turns were disturbed and do not count"
        if not summary.left_out:
            left = "too few turns were undisturbed to count those alone, so all count"
        found.append(f"other programs had {percent(summary.others, 0)} of the processors; {left}")
    if summary.restless:
        found.append(f"{', '.join(summary.restless)} kept computing between turns, at the others' expense")
    if summary.groups > 1:
        found.append("too large for all engines at once: each peer was measured with the native engine alone")
    return found


def overview_grid(summaries: Sequence[ShapeSummary], what: str) -> Grid:
    """All shapes, forward or backward: the native engine's minimum, and how many times longer each peer takes."""
    engines = [engine for summary in summaries for engine in summary.engines]
    peers = {engine.line.engine: engine_title(engine) for engine in engines if engine.line.engine != OWN}
    cells = []
    for summary in summaries:
        own = summary.engine(OWN)
        timing = own.timings.get(what) if own is not None else None
        roofline = summary.rooflines.get(what)
        row = [
            _name(summary, " #"),
            number(roofline.ms.min) if roofline is not None else NOTHING,
            *(lowest_cells(timing.ms) if timing is not None else (_word(own, what), NOTHING, NOTHING)),
            _over(timing),
        ]
        for name in peers:
            peer = summary.engine(name)
            found = None if peer is None else peer.timings.get(what)
            row.append(compared(found.against_own) if found is not None else _word(peer, what))
        cells.append(tuple(row))
    own_cells = ("roofline ms", "native min ms", *LOWEST[1:], "x roofline")
    headings = ("shape", *own_cells, *(f"{title} / native" for title in peers.values()))
    return Grid(what, ("ratios of minima",), headings, tuple(cells))


def _word(engine: EngineSummary | None, what: str) -> str:
    """Why there is no time: the verdict, or nothing where the engine does not compute this."""
    verdict = engine.verdict(what) if engine is not None else "UNSUPPORTED"
    return NOTHING if verdict in ("UNSUPPORTED", "PASS") else verdict


def _over(timing: EngineTiming | None) -> str:
    over = timing.over_roofline if timing is not None else None
    return NOTHING if over is None else ratio(over.value)


def _best(rate: Statistics, unit: float) -> str:
    return f"{number(rate.max * unit)} (median {number(rate.median * unit)})"


def _bound(roofline: Roofline | None) -> str:
    return NOTHING if roofline is None else f"{number(roofline.ms.min)} ms ({roofline.bound})"


# ---- phases of the native engine


def stage_grids(summary: ShapeSummary) -> list[Grid]:
    """Where the native engine's time goes, forward and backward: a row for each phase, and their sum."""
    multiply = summary.multiply.max if summary.multiply is not None else 0.0
    read = summary.read.max if summary.read is not None else 0.0
    return [
        Grid(
            f"{_name(summary)}: where the native engine's {times.direction} goes",
            (stage_note(times),),
            STAGE_HEADINGS,
            tuple(stage_rows(times, multiply, read)),
        )
        for times in summary.stages
    ]


# ---- the run


def head_pairs(head: HeadLine) -> list[tuple[str, str]]:
    """(name, value) lines about the run."""
    forced = f", all forced to {head.isa}" if head.isa else ""
    memory = f"{format_bytes(head.machine.memory_bytes)}{forced}"
    method = f"{head.rounds} interleaved rounds after {head.warmup} to warm up; minima, ratios of minima"
    run, _, versions, command = run_pairs(head)
    machine = f"{head.machine.cpu}, {many(head.threads, 'thread')}, {memory}"
    return [run, ("machine", machine), versions, ("method", method), command]


def rows(summaries: Sequence[ShapeSummary]) -> list[dict[str, object]]:
    """A row for each shape, engine and kind of call that was timed: milliseconds and ratios."""
    return [
        {
            "shape": summary.shape.shape,
            "run": summary.run,
            "engine": engine.line.engine,
            "what": what,
            "unit": "ms",
            "count": timing.ms.count,
            "min": timing.ms.min,
            "p10": timing.ms.percentiles[10],
            "median": timing.ms.median,
            "x_roofline": timing.over_roofline.value if timing.over_roofline else "",
            "x_native": timing.against_own.value if timing.against_own else "",
            "x_native_spread": timing.against_own.spread if timing.against_own else "",
        }
        for summary in summaries
        for engine in summary.engines
        for what, timing in engine.timings.items()
    ]


# ---- the picture


def draw(summaries: Sequence[ShapeSummary], warning: str = "") -> bytes | None:
    """The picture as PNG; None where there is nothing to draw.

    A row per shape, a lane in it per engine: a dot at the minimum over the roofline time, a line from it to the 10th
    percentile, a thin one to the median, the minimum's milliseconds beside it; forward on the left, backward on the
    right, one logarithmic axis for both.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    timed = [engine for summary in summaries for engine in summary.engines if "forward" in engine.timings]
    names = {engine.line.engine: engine_title(engine) for engine in timed}
    rows = [s for s in summaries if "forward" in s.rooflines and any("forward" in e.timings for e in s.engines)]
    if not rows or not names:
        return None
    colours = {name: COLOURS.get(name, _OTHERS[place % len(_OTHERS)]) for place, name in enumerate(names)}
    every = [engine.timings for row in rows for engine in row.engines]
    shown = [timings[what] for timings in every for what in DIRECTIONS if what in timings]
    ends = [places for timing in shown if (places := _places(timing)) is not None]
    lowest, highest = min(1.0, *(at[0] for at in ends)), max(at[2] for at in ends)

    height = len(rows) * (_LANE * len(names) + 0.12)
    figure = Figure(figsize=(12, height + 1.5), dpi=150)
    # fixed margins in inches, so that few shapes and many have the same margins
    total = height + 1.5
    grid = figure.add_gridspec(1, 2, left=0.185, right=0.985, top=1 - 0.95 / total, bottom=0.55 / total, wspace=0.035)
    left: Any = None
    for column, what in enumerate(DIRECTIONS):
        axes = figure.add_subplot(grid[0, column], sharey=left, sharex=left)
        left = left or axes
        _panel(axes, rows, list(names), colours, what)
        axes.set_xlim(lowest / 1.12, highest * (highest / lowest) ** 0.15)
        ticks = [tick for tick in _TICKS if lowest / 1.1 <= tick <= highest * 1.1]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        label_x(axes, "times the roofline: minimum, 10th percentile, median")
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_yticks(range(len(rows)), [_label(summary) for summary in rows], fontsize=8.5, color=INK)
    dots: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 7, "markeredgewidth": 0}
    handles = [Line2D([], [], color=colours[name], label=title, **dots) for name, title in names.items()]
    place: dict[str, Any] = {"bbox_to_anchor": (0.178, 1 - 0.1 / total), "ncols": len(handles)}
    legend(figure, handles, fontsize=9.5, handletextpad=0.1, **place)
    return png(figure, warning)


def _panel(axes: Axes, rows: Sequence[ShapeSummary], names: list[str], colours: dict[str, str], what: str) -> None:
    axes.set_xscale("log")
    axes.minorticks_off()
    bare(axes, what, "x", pad=8, size=11)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(1, color=INK, linewidth=1.1, zorder=1)
    lane = 0.86 / len(names)
    for row, summary in enumerate(rows):
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color=style.BAND, zorder=0, linewidth=0)
        for place, name in enumerate(names):
            engine = summary.engine(name)
            timing = None if engine is None else engine.timings.get(what)
            at = _places(timing) if timing is not None else None
            if timing is None or at is None:
                continue
            y, own = row - 0.43 + lane * (place + 0.5), name == OWN
            for end, width in ((at[1], 3), (at[2], 1)):
                axes.plot([at[0], end], [y, y], color=colours[name], linewidth=width, alpha=0.45, solid_capstyle="butt")
            axes.plot(at[0], y, "o", color=colours[name], markersize=7.5 if own else 6, markeredgewidth=0)
            weight = {"color": INK, "fontweight": "bold"} if own else {"color": style.QUIET}
            beside(axes, f"{number(timing.ms.min)} ms", (at[2], y), **weight)


def _places(timing: EngineTiming) -> tuple[float, float, float] | None:
    """Minimum, 10th percentile and median, as multiples of the roofline's minimum."""
    if timing.over_roofline is None:
        return None
    scale = timing.over_roofline.value / timing.ms.min
    return scale * timing.ms.min, scale * timing.ms.percentiles[10], scale * timing.ms.median


def _label(summary: ShapeSummary) -> str:
    """Three lines: the sizes of the weights, the rest of the case, and the rooflines in milliseconds."""
    case = Case.parse(summary.shape.case)
    routing = "" if case.routing == "uniform" else f", {case.routing}"
    run = f"  #{summary.run}" if summary.run > 1 else ""
    sizes = f"E{case.num_experts} H{case.hidden} I{case.intermediate}{run}"
    bounds = [number(r.ms.min) for r in summary.rooflines.values()]
    return f"{sizes}\nT{case.qlen} k{case.top_k} r{case.rank}{routing}\nroofline {' / '.join(bounds)} ms"
