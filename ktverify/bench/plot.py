"""The bench as one picture: how many times the roofline each engine takes.

Comes in: summaries. Goes out: a PNG file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktverify.bench.engines import OWN
from ktverify.bench.summary import ShapeSummary, Timing
from ktverify.bench.tables import number
from ktverify.spec.cases import Case
from ktverify.system.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    OWN: "#6d2f91",
    "kt_kernel": "#d9772b",
    "torch_loop": "#1f6fb2",
    "torch_grouped_mm": "#2a9d7c",
    "vllm": "#8a6f3e",
}
_OTHERS = ("#b5495b", "#5b6770", "#3f7f93")
_INK, _QUIET, _RULE, _BAND = "#2b3036", "#747d86", "#dfe3e7", "#f6f7f9"
_LANE = 0.25  # inches of height for one engine at one shape
_TICKS = (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000)


def draw(summaries: Sequence[ShapeSummary], path: Path) -> bool:
    """Write the picture to `path`; False where there is nothing to draw.

    A row per shape, a lane in it per engine: a dot at the median over the roofline time, a line between the quartiles,
    the milliseconds beside it; forward on the left, backward on the right, one logarithmic axis for both.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names: dict[str, str] = {}
    for summary in summaries:
        for engine in summary.engines:
            if engine.forward is not None:
                title = engine.line.title + ("" if engine.line.lora else " (no LoRA)")
                names.setdefault(engine.line.engine, title)
    rows = [s for s in summaries if s.forward is not None and any(e.forward is not None for e in s.engines)]
    if not rows or not names:
        return False
    colours = {name: COLOURS.get(name, _OTHERS[place % len(_OTHERS)]) for place, name in enumerate(names)}
    ends = [end for summary in rows for timing in _timings(summary) if (end := _ends(timing))]
    lowest, highest = min(1.0, *(low for low, _ in ends)), max(high for _, high in ends)

    height = len(rows) * (_LANE * len(names) + 0.12)
    figure = Figure(figsize=(12, height + 1.5), dpi=150)
    # fixed margins in inches, so that few shapes and many look alike
    total = height + 1.5
    grid = figure.add_gridspec(1, 2, left=0.185, right=0.985, top=1 - 0.95 / total, bottom=0.55 / total, wspace=0.035)
    left: Any = None
    for column, what in enumerate(("forward", "backward")):
        axes = figure.add_subplot(grid[0, column], sharey=left, sharex=left)
        left = left or axes
        _panel(axes, rows, list(names), colours, what)
        axes.set_xlim(lowest / 1.12, highest * (highest / lowest) ** 0.15)
        axes.set_title(what, loc="left", color=_INK, fontsize=11, fontweight="bold", pad=8)
        ticks = [tick for tick in _TICKS if lowest / 1.1 <= tick <= highest * 1.1]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel("times the roofline", color=_QUIET, fontsize=9)
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_yticks(range(len(rows)), [_label(summary) for summary in rows], fontsize=8.5, color=_INK)
    style: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 7, "markeredgewidth": 0}
    handles = [Line2D([], [], color=colours[name], label=title, **style) for name, title in names.items()]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.178, 1 - 0.1 / total),
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        labelcolor=_INK,
        handletextpad=0.1,
        columnspacing=1.6,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_whole(path, buffer.getvalue())
    return True


def _panel(axes: Axes, rows: Sequence[ShapeSummary], names: list[str], colours: dict[str, str], what: str) -> None:
    axes.set_xscale("log")
    axes.minorticks_off()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c5cad0")
    axes.tick_params(length=0, colors=_QUIET, labelsize=8.5, pad=5)
    axes.grid(axis="x", color=_RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(1, color=_INK, linewidth=1.1, zorder=1)
    lane = 0.86 / len(names)
    for row, summary in enumerate(rows):
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color=_BAND, zorder=0, linewidth=0)
        for place, name in enumerate(names):
            engine = summary.engine(name)
            timing: Timing | None = None if engine is None else getattr(engine, what)
            if timing is None or timing.over_roofline is None:
                continue
            at, y = timing.over_roofline, row - 0.43 + lane * (place + 0.5)
            own = name == OWN
            axes.plot([at.low, at.high], [y, y], color=colours[name], linewidth=2, alpha=0.45, solid_capstyle="butt")
            axes.plot(at.median, y, "o", color=colours[name], markersize=7.5 if own else 6, markeredgewidth=0)
            axes.annotate(
                f"{number(timing.ms.median)} ms",
                (max(at.high, at.median), y),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=_INK if own else _QUIET,
                fontweight="bold" if own else "normal",
            )


def _label(summary: ShapeSummary) -> str:
    """Two lines: the sizes that tell shapes apart, and the roofline in milliseconds."""
    case = Case.parse(summary.shape.case)
    routing = "" if case.routing == "uniform" else f", {case.routing}"
    run = f"  #{summary.run}" if summary.run > 1 else ""
    sizes = f"E{case.num_experts} H{case.hidden} I{case.intermediate}{run}"
    bounds = [f"{number(r.ms.median)}" for r in (summary.forward, summary.backward) if r is not None]
    return f"{sizes}\nT{case.qlen} k{case.top_k} r{case.rank}{routing}\nroofline {' / '.join(bounds)} ms"


def _timings(summary: ShapeSummary) -> list[Timing]:
    found = [timing for engine in summary.engines for timing in (engine.forward, engine.backward)]
    return [timing for timing in found if timing is not None]


def _ends(timing: Timing) -> tuple[float, float] | None:
    over = timing.over_roofline
    return None if over is None else (over.low, over.high)
