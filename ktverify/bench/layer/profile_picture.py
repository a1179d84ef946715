"""A profile as one PNG: what each worker did and when, and where the time went by phase."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ktverify.bench.layer.profile import READING
from ktverify.bench.layer.profile_views import ProfileSummary, RangeSummary, stage_name
from ktverify.bench.phases import PHASES
from ktverify.engines.native.phase_times import WAIT, StageTimes
from ktverify.report import style
from ktverify.report.numbers import number, percent
from ktverify.report.style import INK, bare, beside, label_x, legend, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STAGES, _MORE = (style.PURPLE, style.BLUE, style.GREEN, style.ORANGE), (style.RED, style.BROWN)
_LANE, _BAR, _GAP = 0.3, 0.24, 1.05  # inches
_MOST_LANES = 64
Bar = tuple[int, int, str]  # begin and length in ns, colour


def draw(summary: ProfileSummary) -> bytes:
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
        times = found.shortest.stages[0]
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
    return png(figure, summary.warning)


def _lanes(axes: Axes, found: RangeSummary) -> None:
    """What each worker did."""
    times = found.shortest.stages[0]
    stages = [_STAGES[stage % len(_STAGES)] for stage in range(times.stages)]
    lanes: dict[str, list[Bar]] = {}
    for worker, spans in enumerate(times.spans[:_MOST_LANES]):
        bars = lanes[f"worker {worker}"] = []
        for span in spans:
            bars.append((span.begin, span.work_end - span.begin, stages[span.stage]))
            bars.append((span.work_end, span.end - span.work_end, style.WAITING))
    colours = {stage_name(times, stage): colour for stage, colour in enumerate(stages)}
    colours |= {"waiting": style.WAITING, "outside the stages": style.BAND}
    title = f"{found.range}: the shortest call, {number(times.wall_ns / 1e6)} ms in the engine"
    _timeline(axes, title, "ms since the engine's call began", times.wall_ns, lanes, colours)


def _parts(axes: Axes, found: RangeSummary) -> None:
    """A training step: its parts one after the other."""
    call = found.shortest
    names = dict.fromkeys(part.name for part in call.parts)
    colours = dict(zip(names, (*_STAGES, *_MORE), strict=False)) | {READING: style.WAITING}
    bars = [(part.at, part.ns, colours[part.name]) for part in call.parts]
    title = f"{found.range}: the shortest step, {number(call.ns / 1e6)} ms"
    _timeline(axes, title, "ms since the step began", call.ns, {"Python": bars}, colours)


def _timeline(
    axes: Axes, title: str, below: str, ns: int, lanes: dict[str, list[Bar]], colours: dict[str, str]
) -> None:
    """A lane for each name, time from left to right until `ns`; colours: what each means."""
    from matplotlib.patches import Patch

    for row, bars in enumerate(lanes.values()):
        for begin, length, colour in ((0, ns, style.BAND), *bars):
            axes.barh(row, length / 1e6, left=begin / 1e6, height=0.72, color=colour)
    bare(axes, title, pad=18)
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    axes.set_xlim(0, ns / 1e6)
    axes.set_yticks(range(len(lanes)), list(lanes), color=INK)
    label_x(axes, below)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.006, 0.985), "borderaxespad": 0.1}
    legend(axes, handles, ncols=len(handles), handlelength=1.0, **place)


def _bars(axes: Axes, summary: ProfileSummary, times: StageTimes) -> None:
    """A bar per phase: its part of the wall time; a line where the roofline would end it."""
    longest = max(phase.wall_ns for phase in times.phases) / 1e6
    for row, phase in enumerate(times.phases):
        ms, least = phase.wall_ns / 1e6, summary.roofline_ns(phase) / 1e6
        axes.barh(row, ms, height=0.66, color=style.WAITING if phase.name == WAIT else style.LILAC)
        label = f"{number(ms)} ms, {percent(phase.wall_ns / times.wall_ns)}"
        if least and phase.name != WAIT:
            axes.plot([least, least], [row - 0.42, row + 0.42], color=INK, linewidth=1.4)
            label += f", roofline {percent(least / ms, 0)} of it" if ms else ""
        beside(axes, label, (max(ms, least), row))
    bare(axes, f"{times.direction} by phase (mean over the workers); a black line where the roofline would end it", "x")
    axes.set_xlim(0, longest * 1.4)
    axes.set_ylim(len(times.phases) - 0.45, -0.55)
    axes.set_yticks(range(len(times.phases)), [PHASES[phase.name] for phase in times.phases], color=INK)
    label_x(axes, "ms")
