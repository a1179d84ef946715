"""A profile as one picture: what each worker did and when, and where the time went by phase.

Comes in: a summary. Goes out: a PNG.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ktverify.bench.layer.profile import READING
from ktverify.bench.layer.profile_summary import RangeSummary, Summary, stage_name
from ktverify.bench.tables import PHASES, number
from ktverify.engines.native.phase_times import WAIT, StageTimes
from ktverify.report.style import BLUE, BROWN, GREEN, INK, ORANGE, PURPLE, QUIET, RED, bare, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STAGES, _MORE, _PHASE = (PURPLE, BLUE, GREEN, ORANGE), (RED, BROWN), "#8d6aa8"
_WAIT, _OUTSIDE = "#d5d9dd", "#f1f2f4"
_LANE, _BAR, _GAP = 0.3, 0.24, 1.05  # inches
_MOST_LANES = 64


def draw(summary: Summary) -> bytes:
    """The PNG.

    For forward and backward: on top a lane per worker, coloured by parallel stage, grey where it waits; below it a bar
    per phase with its share, a line where the roofline would end it. Then a training step as Python sees it, in one
    lane. The first 64 workers are drawn.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[float, Callable[[Axes], None]]] = []
    for found in summary.ranges:
        if found.range == "full_train_loop":
            panels.append((_LANE, functools.partial(_parts, found=found)))
            continue
        times = found.typical.stages[0]
        panels.append((_LANE * min(times.workers, _MOST_LANES) + 0.1, functools.partial(_lanes, found=found)))
        panels.append((_BAR * len(times.phases), functools.partial(_bars, summary=summary, times=times)))
    total = sum(height for height, _ in panels) + _GAP * len(panels) + 0.35
    figure = Figure(figsize=(11, total), dpi=150)
    title = f"{summary.head.case}  on {summary.head.isa}"
    figure.text(0.012, 1 - 0.2 / total, title, fontsize=10.5, color=INK, va="top")
    top = 0.35
    for height, panel in panels:
        top += _GAP * 0.62
        panel(figure.add_axes((0.175, 1 - (top + height) / total, 0.8, height / total)))
        top += height + _GAP * 0.38
    return png(figure)


def _lanes(axes: Axes, found: RangeSummary) -> None:
    """What each worker did: time from left to right in milliseconds."""
    from matplotlib.patches import Patch

    times = found.typical.stages[0]
    shown = times.spans[:_MOST_LANES]
    for worker, spans in enumerate(shown):
        axes.barh(worker, times.wall_ns / 1e6, height=0.72, color=_OUTSIDE)
        for span in spans:
            work = (span.work_end - span.begin) / 1e6
            axes.barh(worker, work, left=span.begin / 1e6, height=0.72, color=_STAGES[span.stage % len(_STAGES)])
            axes.barh(worker, (span.end - span.work_end) / 1e6, left=span.work_end / 1e6, height=0.72, color=_WAIT)
    bare(axes, f"{found.range}: the call of median length, {number(times.wall_ns / 1e6)} ms in the engine", pad=18)
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.set_xlim(0, times.wall_ns / 1e6)
    axes.set_yticks(range(len(shown)), [f"worker {worker}" for worker in range(len(shown))], color=INK)
    axes.set_xlabel("ms since the engine's call began", color=QUIET, fontsize=8.5)
    handles: list[Any] = [
        Patch(color=_STAGES[stage % len(_STAGES)], label=stage_name(times, stage)) for stage in range(times.stages)
    ]
    handles += [Patch(color=_WAIT, label="waiting"), Patch(color=_OUTSIDE, label="outside the stages")]
    _legend(axes, handles)


def _legend(axes: Axes, handles: Sequence[Any]) -> None:
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.006, 0.985),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.0,
        columnspacing=1.3,
        borderaxespad=0.1,
    )


def _parts(axes: Axes, found: RangeSummary) -> None:
    """A training step: its parts one after the other."""
    from matplotlib.patches import Patch

    call = found.typical
    axes.barh(0, call.ns / 1e6, height=0.72, color=_OUTSIDE)
    names = list(dict.fromkeys(part.name for part in call.parts))
    colours = dict(zip(names, (*_STAGES, *_MORE), strict=False)) | {READING: _WAIT}
    for part in call.parts:
        axes.barh(0, part.ns / 1e6, left=part.at / 1e6, height=0.72, color=colours[part.name])
    bare(axes, f"{found.range}: the step of median length, {number(call.ns / 1e6)} ms", pad=18)
    axes.set_ylim(0.45, -0.55)
    axes.set_xlim(0, call.ns / 1e6)
    axes.set_yticks([0], ["Python"], color=INK)
    axes.set_xlabel("ms since the step began", color=QUIET, fontsize=8.5)
    _legend(axes, [Patch(color=colours[name], label=name) for name in names])


def _bars(axes: Axes, summary: Summary, times: StageTimes) -> None:
    """A bar a phase: its part of the wall time; a line where the roofline would end it."""
    longest = max(phase.wall_ns for phase in times.phases) / 1e6
    for row, phase in enumerate(times.phases):
        ms, least = phase.wall_ns / 1e6, summary.roofline_ns(phase) / 1e6
        axes.barh(row, ms, height=0.66, color=_WAIT if phase.name == WAIT else _PHASE)
        label = f"{number(ms)} ms, {100 * phase.wall_ns / times.wall_ns:.1f} %"
        if least and phase.name != WAIT:
            axes.plot([least, least], [row - 0.42, row + 0.42], color=INK, linewidth=1.4)
            label += f", roofline {100 * least / ms:.0f} % of it" if ms else ""
        axes.annotate(
            label, (max(ms, least), row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    bare(axes, f"{times.direction} by phase (mean over the workers); a black line where the roofline would end it", "x")
    axes.set_xlim(0, longest * 1.4)
    axes.set_ylim(len(times.phases) - 0.45, -0.55)
    axes.set_yticks(range(len(times.phases)), [PHASES[phase.name] for phase in times.phases], color=INK)
    axes.set_xlabel("ms", color=QUIET, fontsize=8.5)
