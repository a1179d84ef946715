"""A bench run as one picture: how many times the roofline each engine takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ktverify.bench.engines import OWN
from ktverify.bench.summary import ShapeSummary
from ktverify.bench.tables import DIRECTIONS, engine_title
from ktverify.report import style
from ktverify.report.numbers import number
from ktverify.report.style import INK, bare, beside, label_x, legend, png
from ktverify.spec.cases import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def draw(summaries: Sequence[ShapeSummary]) -> bytes | None:
    """The picture as PNG; None where there is nothing to draw.

    A row per shape, a lane in it per engine: a dot at the median over the roofline time, a line between the quartiles,
    the milliseconds beside it; forward on the left, backward on the right, one logarithmic axis for both.
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
    ends = [over.percentiles for timing in shown if (over := timing.over_roofline) is not None]
    lowest, highest = min(1.0, *(over[25] for over in ends)), max(over[75] for over in ends)

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
        label_x(axes, "times the roofline")
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_yticks(range(len(rows)), [_label(summary) for summary in rows], fontsize=8.5, color=INK)
    dots: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 7, "markeredgewidth": 0}
    handles = [Line2D([], [], color=colours[name], label=title, **dots) for name, title in names.items()]
    place: dict[str, Any] = {"bbox_to_anchor": (0.178, 1 - 0.1 / total), "ncols": len(handles)}
    legend(figure, handles, fontsize=9.5, handletextpad=0.1, **place)
    return png(figure)


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
            if timing is None or timing.over_roofline is None:
                continue
            at, y = timing.over_roofline, row - 0.43 + lane * (place + 0.5)
            own = name == OWN
            low, high = at.percentiles[25], at.percentiles[75]
            axes.plot([low, high], [y, y], color=colours[name], linewidth=2, alpha=0.45, solid_capstyle="butt")
            axes.plot(at.median, y, "o", color=colours[name], markersize=7.5 if own else 6, markeredgewidth=0)
            weight = {"color": INK, "fontweight": "bold"} if own else {"color": style.QUIET}
            beside(axes, f"{number(timing.ms.median)} ms", (max(high, at.median), y), **weight)


def _label(summary: ShapeSummary) -> str:
    """Three lines: the sizes of the weights, the rest of the case, and the rooflines in milliseconds."""
    case = Case.parse(summary.shape.case)
    routing = "" if case.routing == "uniform" else f", {case.routing}"
    run = f"  #{summary.run}" if summary.run > 1 else ""
    sizes = f"E{case.num_experts} H{case.hidden} I{case.intermediate}{run}"
    bounds = [number(r.ms.median) for r in summary.rooflines.values()]
    return f"{sizes}\nT{case.qlen} k{case.top_k} r{case.rank}{routing}\nroofline {' / '.join(bounds)} ms"
