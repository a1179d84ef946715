"""Layer benchmarks as PNGs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ktverify.bench.layer.record import SWEEPS
from ktverify.bench.layer.summary import BACKWARD, BOTH, FORWARD, TITLES, WHATS, SpotSummary, of
from ktverify.report import style
from ktverify.report.numbers import number, ratio
from ktverify.report.style import INK, bare, beside, label_x, legend, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {FORWARD: style.BLUE, BOTH: style.PURPLE, BACKWARD: style.ORANGE}
_ON_PAPER = {"framealpha": 1.0, "facecolor": style.PAPER["facecolor"], "edgecolor": style.PAPER["edgecolor"]}
_BATCHES = (style.BLUE, style.GREEN, style.ORANGE, style.PURPLE, style.RED, style.BROWN)


def layer(case: str, found: Sequence[SpotSummary]) -> bytes:
    """The spread of the first spot's repeats; the TP degrees; tokens per second over batch and sequence."""
    panels: list[Callable[[Axes], None]] = [lambda axes: _spread(axes, found[0])]
    if len(of(found, "tp")) > 1:
        panels.append(lambda axes: _degrees(axes, of(found, "tp")))
    if of(found, "throughput"):
        panels.append(lambda axes: _throughput(axes, of(found, "throughput")))
    figure, places = _figure(case, len(panels))
    for axes, panel in zip(places, panels, strict=True):
        panel(axes)
    # the first panel's names are left of it
    figure.subplots_adjust(left=0.145 if len(panels) > 1 else 0.24)
    return png(figure)


def sweeps(case: str, found: Sequence[SpotSummary]) -> bytes:
    """A panel for each sweep: medians and quartiles, both axes logarithmic. Dashed and dotted: how the operations and
    the weights' bytes of a worker grow, drawn through the last point of forward + backward."""
    groups = [group for varied in SWEEPS if (group := of(found, varied))]
    figure, places = _figure(case, len(groups))
    for axes, group in zip(places, groups, strict=True):
        _cost(axes, group)
    handles, labels = places[0].get_legend_handles_labels()
    columns = len(handles) if len(groups) > 2 else 3
    legend(figure, handles, labels, bbox_to_anchor=(0.052, 0.93), ncols=columns)
    figure.subplots_adjust(top=0.76 if len(groups) > 2 else 0.71)
    return png(figure)


def _figure(case: str, panels: int) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(2.2 + 2.8 * panels, 8.5), 3.9), dpi=150)
    places = figure.subplots(1, panels, squeeze=False)[0]
    figure.subplots_adjust(left=0.06, right=0.985, top=0.82, bottom=0.15, wspace=0.26)
    figure.text(0.012, 0.97, case, fontsize=9.5, color=INK, va="top")
    return figure, list(places)


def _spread(axes: Axes, one: SpotSummary) -> None:
    """A line from the 5th to the 95th percentile, a dot at the median."""
    for row, what in enumerate(WHATS):
        ms, colour = one.ms[what], _COLOURS.get(what, style.QUIET)
        axes.plot([ms.percentiles[5], ms.percentiles[95]], [row, row], color=colour, linewidth=2.5, alpha=0.45)
        axes.plot(ms.median, row, "o", color=colour, markersize=7)
        beside(axes, number(ms.median), (ms.percentiles[95], row), fontsize=8.5, bbox=style.PAPER)
    bare(axes, "median, 5th to 95th percentile", "x")
    axes.set_ylim(len(WHATS) - 0.5, -0.5)
    axes.set_yticks(range(len(WHATS)), list(WHATS), color=INK)
    axes.set_xlim(0, 1.18 * max(ms.percentiles[95] for ms in one.ms.values()))
    label_x(axes, "ms")


def _degrees(axes: Axes, group: Sequence[SpotSummary]) -> None:
    """Speed-up over the first degree."""
    for shift, what in ((-0.19, FORWARD), (0.19, BOTH)):
        values = [group[0].ms[what].median / one.ms[what].median for one in group]
        places = [row + shift for row in range(len(group))]
        bars = axes.bar(places, values, width=0.34, color=_COLOURS[what], label=what)
        axes.bar_label(bars, [ratio(value) for value in values], fontsize=8, color=INK, padding=3, bbox=style.PAPER)
    axes.axhline(1, color=INK, linewidth=0.8)
    bare(axes, f"speed-up over TP {group[0].spot.tp}", "y")
    axes.set_xticks(range(len(group)), [f"TP {one.spot.tp}" for one in group], color=INK)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)
    axes.legend(loc="upper left", ncols=2, fontsize=8, labelcolor=INK, handlelength=1.0, **_ON_PAPER)


def _throughput(axes: Axes, group: Sequence[SpotSummary]) -> None:
    """Tokens per second of forward + backward over the sequence length, a line for each batch."""
    for colour, batch in zip(_BATCHES * len(group), dict.fromkeys(one.spot.batch for one in group), strict=False):
        mine = [one for one in group if one.spot.batch == batch]
        lengths, rates = [one.case.qlen // batch for one in mine], [one.tokens_per_s(BOTH) for one in mine]
        axes.plot(lengths, rates, "o-", color=colour, label=f"batch {batch}", markersize=5, linewidth=1.5)
    bare(axes, "forward + backward, tokens/s", "y")
    axes.set_ylim(0, None)
    _log_ticks(axes, sorted({one.case.qlen // one.spot.batch for one in group}))
    label_x(axes, "sequence length")
    axes.legend(loc="lower right", fontsize=8, labelcolor=INK, **_ON_PAPER)


def _log_ticks(axes: Axes, values: Sequence[int]) -> None:
    """The measured values, and no others."""
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(list(values), [str(value) for value in values])


def _cost(axes: Axes, group: Sequence[SpotSummary]) -> None:
    """One sweep."""
    from matplotlib.ticker import LogLocator

    values = [one.spot.value for one in group]
    for what, colour in _COLOURS.items():
        low, high = ([one.ms[what].percentiles[share] for one in group] for share in (25, 75))
        axes.fill_between(values, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(values, [one.ms[what].median for one in group], "o-", color=colour, label=what, markersize=5)
    through = group[-1].ms[BOTH].median
    shares = {
        "as the operations grow": [one.found.flops / one.found.workers for one in group],
        "as the weights grow": [one.found.weights / one.found.workers for one in group],
    }
    for (label, amounts), dashes in zip(shares.items(), ("--", ":"), strict=True):
        guide = [through * amount / amounts[-1] for amount in amounts]
        axes.plot(values, guide, dashes, color=style.QUIET, linewidth=1.1, label=label)
    bare(axes, f"ms, over {TITLES[group[0].spot.varied]}", "both")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _log_ticks(axes, values)
    label_x(axes, TITLES[group[0].spot.varied])
