"""`bench layer` and `bench sweep`: what was measured at each spot, its tables and its picture, joined in a `View`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktverify.bench.layer import record
from ktverify.bench.layer.record import SWEEPS, LayerLine, Line, MemoryLine, RepeatLine, Spot, SpotLine
from ktverify.bench.timed_run import busy, run_pairs
from ktverify.report import style
from ktverify.report.grid import Grid
from ktverify.report.numbers import (
    LOWEST,
    NOTHING,
    STATISTICS,
    compared,
    count,
    error,
    lowest_cells,
    number,
    ratio,
    statistics_cells,
)
from ktverify.report.pages import View, statistics_row
from ktverify.report.style import INK, bare, beside, label_x, legend, png
from ktverify.spec.cases import Case
from ktverify.system.limits import format_bytes
from ktverify.system.timing import BUSY, Ratio, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORWARD, BOTH, SAVING = "forward", "forward + backward", "forward that saves"
BACKWARD, DIFFERENCE = "backward", "backward by difference"
# what is timed or follows, from one repeat; nanoseconds
WHATS: dict[str, Callable[[RepeatLine], int]] = {
    FORWARD: lambda line: line.forward_ns,
    BOTH: lambda line: line.both_ns,
    SAVING: lambda line: line.saving_ns,
    BACKWARD: lambda line: line.backward_ns,
    DIFFERENCE: lambda line: line.both_ns - line.saving_ns,
}
# what is varied, in words
TITLES = {"tp": "TP", "qlen": "qlen", "rank": "LoRA rank", "threads": "workers", "experts": "experts"}
_COLOURS = {FORWARD: style.BLUE, BOTH: style.PURPLE, BACKWARD: style.ORANGE}
_ON_PAPER: dict[str, Any] = {"framealpha": 1.0, "facecolor": "white", "edgecolor": "none", "fontsize": 8}
_BATCHES = (style.BLUE, style.GREEN, style.ORANGE, style.PURPLE, style.RED, style.BROWN)


@dataclass(frozen=True)
class SpotSummary:
    """One spot. ms: by WHATS, of the repeats that count; memory: None where the run was stopped before it was measured;
    others: the share of the processors that other programs had meanwhile, 0 to 1."""

    spot: Spot
    found: SpotLine
    ms: dict[str, Statistics]
    memory: MemoryLine | None
    others: float

    @property
    def name(self) -> str:
        """A name that no other spot of the run has."""
        if self.spot.varied == "throughput":
            return f"batch {self.spot.batch} x {self.case.qlen // self.spot.batch}"
        return f"{TITLES[self.spot.varied]} {self.spot.value}"

    @property
    def case(self) -> Case:
        return Case.parse(self.spot.case)

    def tokens_per_s(self, what: str) -> float:
        """At the minimum."""
        return self.case.qlen / (self.ms[what].min / 1e3)

    def times_longer(self, first: SpotSummary, what: str) -> Ratio:
        """Than the spot `first`."""
        return Ratio.of(self.ms[what], first.ms[what])


def summarise(lines: Sequence[Line]) -> list[SpotSummary]:
    """One for each spot that has a repeat that counts, in order."""
    summaries = []
    for spot in (spot for line in lines if isinstance(line, LayerLine) for spot in line.spots):
        repeats = [x for x in lines if isinstance(x, RepeatLine) and x.number == spot.number and x.repeat >= 0]
        found = [x for x in lines if isinstance(x, SpotLine) and x.number == spot.number]
        memory = [x for x in lines if isinstance(x, MemoryLine) and x.number == spot.number]
        loads = [x for x in lines if isinstance(x, record.SpotOtherLoadLine) and x.number in (spot.number, None)]
        if repeats and found:
            ms = {what: Statistics.of([of(line) / 1e6 for line in repeats]) for what, of in WHATS.items()}
            others = max((load.others for load in loads), default=0.0)
            summaries.append(SpotSummary(spot, found[0], ms, memory[0] if memory else None, others))
    return summaries


def view(lines: Sequence[Line]) -> View | None:
    """None where no spot was measured."""
    found = summarise(lines)
    if not found:
        return None
    head = next(line for line in lines if isinstance(line, LayerLine))
    groups: dict[str, list[SpotSummary]] = {}
    for one in found:
        groups.setdefault(one.spot.varied, []).append(one)
    warning = disturbed(found)
    if found[0].spot.varied in SWEEPS:
        name, grids = "sweep", [sweep_grid(group) for group in groups.values()]
        text, picture = _growth(found, groups), draw_sweeps(head.case, groups, warning)
    else:
        name, grids = "layer", layer_grids(found, groups)
        text, picture = _times(found[0]), draw_layer(head.case, found, groups, warning)
    return View(name, text, [("case", head.case), *run_pairs(head)], grids, rows(found), picture, warning)


def disturbed(found: Sequence[SpotSummary]) -> str:
    """A note that names the spots where other programs had so much of the processors that the times mean little."""
    bad = [one for one in found if one.others >= BUSY]
    where = f" at {', '.join(one.name for one in bad)}" if len(bad) < len(found) else ""
    return busy((one.others for one in bad), where)


def _times(one: SpotSummary) -> str:
    texts = [f"{what} {number(one.ms[what].min)} ms" for what in (FORWARD, BOTH, BACKWARD)]
    return f"{', '.join(texts)}, {count(one.tokens_per_s(BOTH))} tokens/s (minima)"


def _growth(found: Sequence[SpotSummary], groups: dict[str, list[SpotSummary]]) -> str:
    """One line: how much each sweep's time grows."""
    texts = [
        f"{TITLES[varied]} {group[0].spot.value} to {group[-1].spot.value}: "
        f"{compared(group[-1].times_longer(group[0], BOTH), ' times the time')}"
        for varied, group in groups.items()
        if len(group) > 1
    ]
    return f"{'; '.join(texts) or f'{BOTH} {number(found[0].ms[BOTH].min)} ms'} (minima)"


# ---- tables


def layer_grids(found: Sequence[SpotSummary], groups: dict[str, list[SpotSummary]]) -> list[Grid]:
    grids = [times_grid(found[0])]
    if len(groups.get("tp", ())) > 1:
        grids.append(tp_grid(groups["tp"]))
    if "throughput" in groups:
        grids.append(throughput_grid(groups["throughput"]))
    return [*grids, memory_grid(found)]


def times_grid(one: SpotSummary) -> Grid:
    """A row for each of WHATS; tokens per second at the minimum."""
    lines = []
    for what, ms in one.ms.items():
        rate = count(one.tokens_per_s(what)) if what in (FORWARD, BOTH) else NOTHING
        lines.append((what, *statistics_cells(ms), rate))
    rel_l2 = ", ".join(f"{name} {error(value, 1)}" for name, value in one.found.rel_l2.items())
    repeats = f"{one.spot.warmup} warm-ups before {one.ms[FORWARD].count} repeats"
    notes = (
        f"{one.found.isa}, TP {one.spot.tp}, {one.found.workers} workers; {repeats}; the first forward, which packs "
        f"the weights, {number(one.found.first_ns / 1e6)} ms",
        f"rel_l2 against fp32: {rel_l2}",
    )
    return Grid("times", notes, ("", *STATISTICS, "tokens/s"), tuple(lines))


def tp_grid(group: Sequence[SpotSummary]) -> Grid:
    """A row for each degree, with its speed-up over the first."""
    lines, base = [], group[0]
    for one in group:
        cells = []
        for what in (FORWARD, BOTH):
            gain = compared(base.times_longer(one, what)) if one is not base else ratio(1)
            cells += [*lowest_cells(one.ms[what]), gain]
        lines.append((one.name, str(one.found.workers), *cells))
    over = f"x TP {base.spot.tp}"
    times = [(f"{what} {LOWEST[0]}", *LOWEST[1:], over) for what in (FORWARD, BOTH)]
    note = "speed-ups of minima, each degree in a process of its own"
    return Grid("tensor parallelism", (note,), ("degree", "workers", *times[0], *times[1]), tuple(lines))


def throughput_grid(group: Sequence[SpotSummary]) -> Grid:
    """A row for each batch and sequence length."""
    lines = []
    for one in group:
        cells = [
            cell for what in (FORWARD, BOTH) for cell in (*lowest_cells(one.ms[what]), count(one.tokens_per_s(what)))
        ]
        lines.append((one.name, str(one.case.qlen), *cells))
    times = [(f"{what} {LOWEST[0]}", *LOWEST[1:], "tokens/s") for what in (FORWARD, BOTH)]
    headings = ("batch x sequence", "tokens", *times[0], *times[1])
    return Grid("throughput", ("tokens/s at the minimum; each in a process of its own",), headings, tuple(lines))


def memory_grid(found: Sequence[SpotSummary]) -> Grid:
    """A row for each spot: growth of its process over the bf16 weights of the experts that tokens reach."""
    lines = []
    for one in found:
        if one.memory is not None:
            points = (one.memory.loaded, one.memory.packed, one.memory.first_step, one.memory.last_step)
            over = ratio(one.memory.last_step / one.found.weights)
            grown = one.memory.last_step - one.memory.first_step
            lines.append((one.name, *map(format_bytes, (one.found.weights, *points, grown)), over))
    steps = f"after {found[0].spot.steps} steps"
    headings = ("", "weights reached", "loaded", "first forward", "1 step", steps, "since 1 step", f"{steps} / reached")
    note = "resident memory beyond that of the process before it had inputs; a step is forward, backward, AdamW, update"
    return Grid("memory", (note,), headings, tuple(lines))


def sweep_grid(group: Sequence[SpotSummary]) -> Grid:
    """A row for each value of what is varied; growth of time and of operations over the first."""
    lines, base, title = [], group[0], TITLES[group[0].spot.varied]
    for one in group:
        cells = [cell for what in (FORWARD, BOTH, BACKWARD) for cell in lowest_cells(one.ms[what])]
        rate = number(one.found.flops / one.ms[FORWARD].min / 1e6)
        growth = compared(one.times_longer(base, BOTH)) if one is not base else ratio(1)
        work = ratio(one.found.flops / base.found.flops)
        packed = format_bytes(one.memory.packed) if one.memory is not None else NOTHING
        lines.append((str(one.spot.value), *cells, count(one.tokens_per_s(BOTH)), rate, growth, work, packed))
    times = [heading for what in (FORWARD, BOTH, BACKWARD) for heading in (f"{what} {LOWEST[0]}", *LOWEST[1:])]
    headings = (title, *times, "tokens/s", "forward GFLOP/s", "growth", "of operations", "memory")
    note = "rates and growth at the minima; each in a process of its own"
    return Grid(f"over {title}", (note,), headings, tuple(lines))


def rows(found: Sequence[SpotSummary]) -> list[dict[str, object]]:
    """A row for each spot and what it timed: milliseconds."""
    return [
        {
            **{name: getattr(one.spot, name) for name in ("varied", "value", "case")},
            "isa": one.found.isa,
            "tp": one.spot.tp,
            "workers": one.found.workers,
            "what": what,
            "unit": "ms",
            "others": one.others,
            **statistics_row(ms),
        }
        for one in found
        for what, ms in one.ms.items()
    ]


# ---- pictures, as PNGs


def draw_layer(
    case: str, found: Sequence[SpotSummary], groups: dict[str, list[SpotSummary]], warning: str = ""
) -> bytes:
    """The spread of the first spot's repeats; the TP degrees; tokens per second over batch and sequence."""
    panels: list[Callable[[Axes], None]] = [lambda axes: _spread(axes, found[0])]
    if len(groups.get("tp", ())) > 1:
        panels.append(lambda axes: _degrees(axes, groups["tp"]))
    if "throughput" in groups:
        panels.append(lambda axes: _throughput(axes, groups["throughput"]))
    figure, places = _figure(case, len(panels))
    for axes, panel in zip(places, panels, strict=True):
        panel(axes)
    # the first panel's names are left of it
    figure.subplots_adjust(left=0.145 if len(panels) > 1 else 0.24)
    return png(figure, warning)


def draw_sweeps(case: str, groups: dict[str, list[SpotSummary]], warning: str = "") -> bytes:
    """A panel for each sweep: minima, a band to the 10th percentile, both axes logarithmic. Dashed and dotted: how the
    operations and the weights' bytes of a worker grow, drawn through the last point of forward + backward."""
    figure, places = _figure(case, len(groups))
    for axes, group in zip(places, groups.values(), strict=True):
        _cost(axes, group)
    handles, labels = places[0].get_legend_handles_labels()
    columns, top = (len(handles), 0.76) if len(groups) > 2 else (3, 0.71)
    legend(figure, handles, labels, bbox_to_anchor=(0.052, 0.93), ncols=columns)
    figure.subplots_adjust(top=top)
    return png(figure, warning)


def _figure(case: str, panels: int) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(2.2 + 2.8 * panels, 8.5), 3.9), dpi=150)
    places = figure.subplots(1, panels, squeeze=False)[0]
    figure.subplots_adjust(left=0.06, right=0.985, top=0.82, bottom=0.15, wspace=0.26)
    figure.text(0.012, 0.97, case, fontsize=9.5, color=INK, va="top")
    return figure, list(places)


def _spread(axes: Axes, one: SpotSummary) -> None:
    """A dot at the minimum, a line from it to the 10th percentile, a thin one to the median."""
    for row, (what, ms) in enumerate(one.ms.items()):
        colour = _COLOURS.get(what, style.QUIET)
        for end, width in ((ms.percentiles[10], 3.5), (ms.median, 1.2)):
            axes.plot([ms.min, end], [row, row], color=colour, linewidth=width, alpha=0.45)
        axes.plot(ms.min, row, "o", color=colour, markersize=7)
        beside(axes, number(ms.min), (ms.median, row), fontsize=8.5, bbox=style.PAPER)
    bare(axes, "minimum, 10th percentile, median", "x")
    axes.set_ylim(len(one.ms) - 0.5, -0.5)
    axes.set_yticks(range(len(one.ms)), list(one.ms), color=INK)
    axes.set_xlim(0, 1.18 * max(ms.median for ms in one.ms.values()))
    label_x(axes, "ms")


def _degrees(axes: Axes, group: Sequence[SpotSummary]) -> None:
    """Speed-up over the first degree, of minima."""
    for shift, what in ((-0.19, FORWARD), (0.19, BOTH)):
        gains = [group[0].times_longer(one, what) for one in group]
        values = [gain.value for gain in gains]
        texts = [ratio(1), *(compared(gain).replace("noisy ", "noisy\n") for gain in gains[1:])]
        places = [row + shift for row in range(len(group))]
        bars = axes.bar(places, values, width=0.34, color=_COLOURS[what], label=what)
        axes.bar_label(bars, texts, fontsize=8, color=INK, padding=3, bbox=style.PAPER)
    axes.axhline(1, color=INK, linewidth=0.8)
    bare(axes, f"speed-up over TP {group[0].spot.tp}", "y")
    axes.set_xticks(range(len(group)), [f"TP {one.spot.tp}" for one in group], color=INK)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)
    axes.legend(loc="upper left", ncols=2, labelcolor=INK, handlelength=1.0, **_ON_PAPER)


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
    axes.legend(loc="lower right", labelcolor=INK, **_ON_PAPER)


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
        low, high = [one.ms[what].min for one in group], [one.ms[what].percentiles[10] for one in group]
        axes.plot(values, low, "o-", color=colour, label=what, markersize=5)
        band = "to the 10th percentile" if what == BACKWARD else None
        axes.fill_between(values, low, high, color=colour, alpha=0.15, linewidth=0, label=band)
    for name, dashes in (("flops", "--"), ("weights", ":")):
        amounts = [getattr(one.found, name) / one.found.workers for one in group]
        guide = [group[-1].ms[BOTH].min * amount / amounts[-1] for amount in amounts]
        label = f"as the {'operations' if name == 'flops' else name} grow"
        axes.plot(values, guide, dashes, color=style.QUIET, linewidth=1.1, label=label)
    bare(axes, f"ms, over {TITLES[group[0].spot.varied]}", "both")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _log_ticks(axes, values)
    label_x(axes, TITLES[group[0].spot.varied])
