"""A profile as one picture: what each worker did and when, and where the time went by phase.

Comes in: the head line and summaries. Goes out: a PNG file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktverify.bench.tables import PHASES, number
from ktverify.files import write_whole
from ktverify.profile.record import ProfileLine
from ktverify.profile.summary import RangeSummary, roofline_ns, stage_name
from ktverify.stages import WAIT, StageTimes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STAGES = ("#6d2f91", "#1f6fb2", "#2a9d7c", "#d9772b")
_WAIT, _INK, _QUIET, _RULE = "#d5d9dd", "#2b3036", "#747d86", "#dfe3e7"
_LANE, _BAR, _GAP = 0.3, 0.24, 1.05  # inches
_MOST_LANES = 64


def draw(head: ProfileLine, summaries: Sequence[RangeSummary], path: Path) -> bool:
    """Write the picture to `path`; False where no engine call was recorded.

    For forward and backward: on top a lane per worker, coloured by parallel stage, grey where it waits; below it a bar
    per phase with its share, a line where the roofline would end it. The first 64 workers are drawn.
    """
    from matplotlib.figure import Figure

    found = [summary for summary in summaries if summary.range != "full_train_loop"]
    if not found:
        return False
    heights = []
    for summary in found:
        times = summary.typical.stages[0]
        heights += [_LANE * min(times.workers, _MOST_LANES) + 0.1, _BAR * len(times.phases)]
    total = sum(heights) + _GAP * len(heights) + 0.35
    figure = Figure(figsize=(11, total), dpi=150)
    figure.text(0.012, 1 - 0.2 / total, f"{head.case}  on {head.isa}", fontsize=10.5, color=_INK, va="top")
    top = 0.35
    for place, height in enumerate(heights):
        top += _GAP * 0.62
        axes = figure.add_axes((0.16, 1 - (top + height) / total, 0.815, height / total))
        top += height + _GAP * 0.38
        summary = found[place // 2]
        if place % 2:
            _bars(axes, head, summary.typical.stages[0])
        else:
            _lanes(axes, summary)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_whole(path, buffer.getvalue())
    return True


def _plain(axes: Axes, title: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c5cad0")
    axes.tick_params(length=0, colors=_QUIET, labelsize=8.5, pad=4)
    axes.set_title(title, loc="left", color=_INK, fontsize=10.5, fontweight="bold", pad=18)


def _lanes(axes: Axes, summary: RangeSummary) -> None:
    """What each worker did: time from left to right in milliseconds."""
    from matplotlib.patches import Patch

    times = summary.typical.stages[0]
    shown = times.spans[:_MOST_LANES]
    for worker, spans in enumerate(shown):
        axes.barh(worker, times.wall_ns / 1e6, height=0.72, color="#f1f2f4")
        for span in spans:
            work = (span.work_end - span.begin) / 1e6
            axes.barh(worker, work, left=span.begin / 1e6, height=0.72, color=_STAGES[span.stage % len(_STAGES)])
            axes.barh(worker, (span.end - span.work_end) / 1e6, left=span.work_end / 1e6, height=0.72, color=_WAIT)
    _plain(axes, f"{summary.range}: the call of median length, {number(times.wall_ns / 1e6)} ms in the engine")
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.set_xlim(0, times.wall_ns / 1e6)
    axes.set_yticks(range(len(shown)), [f"worker {worker}" for worker in range(len(shown))], color=_INK)
    axes.set_xlabel("ms since the engine's call began", color=_QUIET, fontsize=8.5)
    handles: list[Any] = [
        Patch(color=_STAGES[stage % len(_STAGES)], label=stage_name(times, stage)) for stage in range(times.stages)
    ]
    handles += [Patch(color=_WAIT, label="waiting"), Patch(color="#f1f2f4", label="outside the stages")]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.006, 0.985),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        labelcolor=_INK,
        handlelength=1.0,
        columnspacing=1.3,
        borderaxespad=0.1,
    )


def _bars(axes: Axes, head: ProfileLine, times: StageTimes) -> None:
    """A bar a phase: its part of the wall time; a line where the roofline would end it."""
    longest = max(phase.wall_ns for phase in times.phases) / 1e6
    for row, phase in enumerate(times.phases):
        ms, least = phase.wall_ns / 1e6, roofline_ns(phase, head.read, head.multiply) / 1e6
        axes.barh(row, ms, height=0.66, color=_WAIT if phase.name == WAIT else "#8d6aa8")
        label = f"{number(ms)} ms, {100 * phase.wall_ns / times.wall_ns:.1f} %"
        if least and phase.name != WAIT:
            axes.plot([least, least], [row - 0.42, row + 0.42], color=_INK, linewidth=1.4)
            label += f", roofline {100 * least / ms:.0f} % of it" if ms else ""
        axes.annotate(
            label, (max(ms, least), row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8, color=_INK
        )
    _plain(axes, f"{times.direction} by phase (mean over the workers); a black line where the roofline would end it")
    axes.title.set_position((0, 1))
    axes.grid(axis="x", color=_RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlim(0, longest * 1.4)
    axes.set_ylim(len(times.phases) - 0.45, -0.55)
    axes.set_yticks(range(len(times.phases)), [PHASES[phase.name] for phase in times.phases], color=_INK)
    axes.set_xlabel("ms", color=_QUIET, fontsize=8.5)
