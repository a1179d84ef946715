"""Plots of a run of the suites as inline SVG that needs nothing from outside the page; "" where there are no values."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ktverify.report.numbers import error, many, number
from ktverify.report.style import EDGE, FAIL, INK, QUIET, RULE, bare, isa_colour, legend
from ktverify.report.tables import NO_ISA, isa_rank
from ktverify.runs.record import NOT_RUN, AccuracyRecord, LatencyRecord
from ktverify.spec.names import ALL_TENSORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def rel_l2_by_tensor(records: Sequence[AccuracyRecord]) -> str:
    """One row per tensor, one dot per record at its rel_l2 (log axis), coloured by ISA; a tick marks each budget.

    Records that equal the oracle bit by bit have no place on a log axis, and records far below every budget (fp32
    results) would squeeze all others into a corner: both are counted in the row's right margin.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    rows = [r for r in records if r.verdict not in NOT_RUN and r.gates]
    shown = [r for r in rows if math.isfinite(r.rel_l2) and r.rel_l2 > 0]
    if not shown:
        return ""
    budgets_of_all = [budget for r in shown if (budget := _rel_l2_budget(r)) > 0]
    least = min(budgets_of_all) / 20 if budgets_of_all else 0.0
    present = {r.tensor for r in rows}
    # in the contract's order, then unknown ones by name
    tensors = [t for t in ALL_TENSORS if t in present] + sorted(present - set(ALL_TENSORS))
    isas = sorted({r.isa for r in shown}, key=isa_rank)
    figure, axes = _figure(height=0.75 + (0.2 + 0.12 * len(isas)) * len(tensors))
    lane = 0.72 / len(isas)
    for row, tensor in enumerate(tensors):
        for index, isa in enumerate(isas):
            members = [r for r in shown if r.tensor == tensor and r.isa == isa]
            centre = row - 0.36 + lane * (index + 0.5)
            budgets = sorted({budget for r in members if (budget := _rel_l2_budget(r)) > 0})
            axes.vlines(budgets, centre - lane / 2, centre + lane / 2, colors=EDGE, linewidths=1.3, zorder=1)
            for failed in (False, True):
                points = [r for r in members if (r.verdict != "PASS") == failed and r.rel_l2 >= least]
                axes.scatter(
                    [r.rel_l2 for r in points],
                    [centre + _jitter(i) * lane * 0.6 for i in range(len(points))],
                    s=34 if failed else 16,
                    marker="D" if failed else "o",
                    color=FAIL if failed else isa_colour(isa),
                    alpha=0.95 if failed else 0.65,
                    linewidths=0,
                    zorder=3 if failed else 2,
                )
        exact = sum(1 for r in rows if r.tensor == tensor and r.rel_l2 == 0)
        below = sum(1 for r in shown if r.tensor == tensor and r.rel_l2 < least)
        lost = sum(1 for r in rows if r.tensor == tensor and not math.isfinite(r.rel_l2))
        beside = {f"{exact} exact": exact, f"{below} below {error(least, 0)}": below, f"{lost} not finite": lost}
        text = "\n".join(words for words, count in beside.items() if count)
        if text:
            axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), va="center", color=QUIET)
        if row:
            axes.axhline(row - 0.5, color=RULE, linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_yticks(range(len(tensors)), tensors)
    axes.set_ylim(len(tensors) - 0.5, -0.5)
    ends = [r.rel_l2 for r in shown if r.rel_l2 >= least] + budgets_of_all
    low, high = min(ends), max(ends)
    axes.set_xlim(low / 1.25, high * 1.25)
    # the narrower the axis, the more labels fit between two decades
    span = high / low
    subs = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if span < 12 else (1.0, 2.0, 5.0) if span < 3e3 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(lambda value, _position: error(value, 0))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("rel_l2 against the fp64 oracle; grey ticks are budgets")
    _legend(axes, isas, failed=any(r.verdict != "PASS" for r in shown))
    return _svg(figure, "rel-l2")


def budget_used(records: Sequence[AccuracyRecord]) -> str:
    """How many tensors used how much of the budget of their deciding gate, stacked by ISA; beyond 100 % in red.

    Tensors without any error are left out: an exact case shows nothing about budgets, and there are many.
    """
    ran = [r for r in records if r.verdict not in NOT_RUN]
    rows = [r for r in ran if (gate := r.deciding_gate) and gate.used > 0 and gate.budget > 0]
    if not rows:
        return ""
    from matplotlib.ticker import MaxNLocator

    step = 0.05
    # outliers share the last bin: one broken tensor at 10000 % must not squeeze all others into one bar
    last = 29
    isas = sorted({r.isa for r in rows}, key=isa_rank)
    figure, axes = _figure(height=2.5)
    bottom = [0] * (last + 1)
    for isa in isas:
        counts = [0] * (last + 1)
        for r in rows:
            if r.isa == isa:
                counts[min(last, _bin(r.used, step))] += 1
        edges = [100 * step * i for i in range(last + 1)]
        colours = [isa_colour(isa) if edge < 100 - 1e-6 else FAIL for edge in edges]
        axes.bar(edges, counts, width=100 * step * 0.92, align="edge", bottom=bottom, color=colours, linewidth=0)
        bottom = [b + c for b, c in zip(bottom, counts, strict=True)]
    top = max(i for i, count in enumerate(bottom) if count)
    axes.axvline(100, color=FAIL, linewidth=1)
    axes.text(101, 0.97, "budget", transform=axes.get_xaxis_transform(), ha="left", va="top", color=FAIL)
    axes.set_xlim(0, max(105, 100 * step * (top + 1)))
    ticks = [tick for tick in range(0, 151, 25) if tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick} %" if tick < 145 else "more" for tick in ticks])
    axes.set_xlabel("budget used by a tensor" + (" (last bar: 145 % and more)" if top == last else ""))
    axes.set_ylabel("tensors")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    _legend(axes, isas, failed=any(r.used > 1 for r in rows))
    return _svg(figure, "budget")


def latency_bars(records: Sequence[LatencyRecord]) -> str:
    """One bar per measurement to its minimum, a line from there to the 10th percentile, every sample as a dot; ms."""

    def group(r: LatencyRecord) -> tuple[str, str, int, int]:
        return (r.case, r.what, r.tp, r.threads)

    timed = ((r, r.ms) for r in records if r.ms is not None)
    rows = sorted(timed, key=lambda row: (group(row[0]), isa_rank(row[0].isa)))
    if not rows:
        return ""
    from matplotlib.ticker import LogLocator, NullLocator

    labels, ticks, position = [], [], 0.0
    for (case, what, tp, threads), members in groupby(rows, lambda row: group(row[0])):
        labels.append(f"{case}\n{what}{f', TP {tp}' if tp != 1 else ''}, {many(threads, 'thread')}")
        ticks.append([position + place for place, _ in enumerate(members)])
        # a label has two lines, also beside a single bar
        position = ticks[-1][-1] + (1.55 if len(ticks[-1]) > 1 else 2.1)
    positions = [place for bars in ticks for place in bars]
    figure, axes = _figure(height=0.91 + 0.21 * positions[-1])
    low = min(ms.min for _, ms in rows)
    high = max(ms.max for _, ms in rows)
    wide = high / low > 20
    left = 10 ** math.floor(math.log10(low)) if wide else 0.0
    for y, (r, ms) in zip(positions, rows, strict=True):
        colour = FAIL if r.verdict != "PASS" else isa_colour(r.isa)
        axes.barh(y, ms.min - left, left=left, height=0.78, color=colour, alpha=0.32, linewidth=0)
        axes.plot([ms.min, ms.percentiles[10]], [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
        jittered = [y + _jitter(i) * 0.45 for i in range(len(r.samples_ms))]
        axes.scatter(r.samples_ms, jittered, s=5, color=colour, linewidths=0, zorder=3)
        text = f"{number(ms.min, 4)} ms"
        axes.annotate(text, (ms.max, y), xytext=(6, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks([sum(bars) / len(bars) for bars in ticks], labels)
    axes.set_ylim(max(positions) + 0.7, -0.7)
    if wide:
        axes.set_xscale("log")
        axes.set_xlim(left, high * (high / left) ** 0.14)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    else:
        axes.set_xlim(0, high * 1.14)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    scale = ", log axis" if wide else ""
    axes.set_xlabel(f"ms per iteration: bar to the minimum, line to the 10th percentile, dots are iterations{scale}")
    _legend(axes, sorted({r.isa for r, _ in rows}, key=isa_rank), failed=any(r.verdict != "PASS" for r, _ in rows))
    return _svg(figure, "latency")


def _rel_l2_budget(record: AccuracyRecord) -> float:
    """The tightest budget that its rel_l2 has; 0 where only other gates apply."""
    budgets = [g.budget for g in record.gates if g.gate.startswith("rel_l2") and math.isfinite(g.budget)]
    return min(budgets, default=0.0)


def _bin(used: float, step: float) -> int:
    """Bin of a share; exactly 100 % is within the budget, so it is in the bin below."""
    if math.isinf(used):
        return 1 << 30
    index = math.floor(used / step + 1e-9)
    return index - 1 if used <= 1.0 and index * step >= 1.0 - 1e-9 else index


def _jitter(index: int) -> float:
    """Low-discrepancy offsets in [-0.5, 0.5): dots spread evenly and the same run draws the same picture."""
    return (index * 0.6180339887498949) % 1.0 - 0.5


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(11.2, height), layout="constrained")
    axes = figure.add_subplot()
    bare(axes)
    axes.tick_params(colors=INK, labelsize=9.5, pad=6)
    axes.xaxis.label.set_color(QUIET)
    axes.yaxis.label.set_color(QUIET)
    return figure, axes


def _legend(axes: Any, isas: Sequence[str], failed: bool) -> None:
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"linestyle": "", "markersize": 6, "markeredgewidth": 0}
    handles = [Line2D([], [], marker="o", color=isa_colour(isa), label=isa or NO_ISA, **style) for isa in isas]
    if failed:
        handles.append(Line2D([], [], marker="D", color=FAIL, label="did not pass", **style))
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    legend(axes, handles, ncols=len(handles), handletextpad=0.2, fontsize=9.5, **place)


def _svg(figure: Figure, name: str) -> str:
    """The figure as inline SVG: real text, ids that no other plot of the page has, and no address of any kind."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="plot" viewBox="\1" role="img">', text, count=1)
    return text.strip()
