"""PNGs of `bench c2c`: one prompt's timeline, and how the times of many are distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ktverify.bench.c2c.record import PromptRecord
from ktverify.bench.c2c.stages import LANES
from ktverify.bench.c2c.tables import STEP, figure, short, step_times
from ktverify.report.style import BLUE, GREEN, INK, LILAC, ORANGE, PURPLE, bare, label_x, png
from ktverify.system.timing import Statistics, TimedCall

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"base": PURPLE, "teacher": ORANGE, "projectors": GREEN, "decode": BLUE}
# a histogram ends at so many times the way from the median to the 95th percentile
_FAR = 3
_PALE = 0.55
# what the histograms show: their titles, and what they count
_PANELS = {
    "total_ms": ("a prompt, ms", "prompts"),
    STEP: ("a step of decoding, ms", "steps"),
    "tokens_per_second": ("tokens a second", "prompts"),
    "projector_total_ms": ("projectors of a prompt, ms", "prompts"),
}


def draw_timeline(record: PromptRecord, spans: Sequence[TimedCall]) -> bytes:
    """On the left the stages up to the first new token, a lane each; on the right the time of each decoding step."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 2.7), dpi=110, layout="constrained")
    title = f"{short(record.prompt, 60)}  {figure(record.timing.total_ms)} ms"
    page.suptitle(title, x=0.012, ha="left", fontsize=10, color=INK, parse_math=False)
    left, right = page.subplots(1, 2, width_ratios=(3, 2))
    _lanes(left, spans)
    _steps(right, record.timing.decode_step_times_ms)
    return png(page)


def _lanes(axes: Axes, spans: Sequence[TimedCall]) -> None:
    lanes = list(dict.fromkeys(LANES.values()))
    shown = [span for span in spans if span.name != "decode_step" or span.number == 0]
    begin = min(span.at for span in shown)
    for span in shown:
        lane = LANES[span.name]
        # the calls of one stage follow each other: every other one is paler, so that each is seen
        alpha = _PALE if span.number % 2 else 1.0
        axes.barh(lanes.index(lane), span.ns / 1e6, left=(span.at - begin) / 1e6, color=_COLOURS[lane], alpha=alpha)
    bare(axes, "until the first new token")
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    took = {lane: sum(span.ns for span in shown if LANES[span.name] == lane) / 1e6 for lane in lanes}
    axes.set_yticks(range(len(lanes)), [f"{lane}  {figure(took[lane])} ms" for lane in lanes], color=INK)
    axes.set_xlim(left=0)
    label_x(axes, "ms")


def _steps(axes: Axes, times: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    bare(axes, "steps of decoding, ms", "y")
    axes.plot(range(1, len(times) + 1), times, ".-", color=_COLOURS["decode"], linewidth=1, markersize=4)
    axes.set_ylim(bottom=0)
    label_x(axes, "token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_histogram(records: Sequence[PromptRecord]) -> bytes:
    """Four distributions; a line at the median, a dashed one at the 95th percentile. Values far beyond it are counted
    in the title and not drawn: they would squeeze the others."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 4.4), dpi=110, layout="constrained")
    for axes, (name, (title, counted)) in zip(page.subplots(2, 2).flat, _PANELS.items(), strict=True):
        values = step_times(records) if name == STEP else [getattr(record.timing, name) for record in records]
        _histogram(axes, title, counted, values)
    return png(page)


def _histogram(axes: Axes, title: str, counted: str, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    if not values:
        bare(axes, f"{title}: none")
        return
    found = Statistics.of(values)
    high = found.percentiles[95]
    shown = [value for value in values if value <= found.median + _FAR * (high - found.median)]
    axes.hist(shown, bins=_bins(shown), color=LILAC, edgecolor="white", linewidth=0.5)
    axes.axvline(found.median, color=INK, linewidth=1.2)
    axes.axvline(high, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    text = f"{title}: median {figure(found.median)}, p95 {figure(high)}, n = {found.count}"
    beyond = len(values) - len(shown)
    bare(axes, f"{text}\n{beyond} beyond, to {figure(found.max)}" if beyond else text, size=8.5)
    axes.set_ylabel(counted, fontsize=8.5)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _bins(values: Sequence[float]) -> int:
    """The root of their number, from 5 to 40."""
    return min(40, max(5, math.ceil(math.sqrt(len(values)))))
