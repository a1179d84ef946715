"""The tables and the picture of `bench transformer`, joined in a `View`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktverify.bench.timed_run import disturbed, run_pairs
from ktverify.bench.transformer.measure import agreement
from ktverify.bench.transformer.record import EndLine, Line, ProcessLine, StepLine, TransformerLine
from ktverify.bench.transformer.sizes import forward_flops, parameters
from ktverify.report.grid import Grid
from ktverify.report.numbers import STATISTICS, count, many, mean_and_std, number, ratio, statistics_cells
from ktverify.report.pages import View, statistics_row
from ktverify.report.style import BLUE, INK, ORANGE, QUIET, RULE, bare, label_x, legend, png
from ktverify.system.limits import format_bytes
from ktverify.system.timing import Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHATS = ("forward", "backward", "step")
# how far the clock may be from an independent loop
TOLERANCE = 0.03
# operations over the forward's: backward has two products for each of the forward's
_WORK = {"forward": 1.0, "backward": 2.0, "step": 3.0}
_COLOURS = {"forward": BLUE, "backward": ORANGE}


@dataclass(frozen=True)
class Arm:
    """One process: its steps that count and, before them, its warm-ups. ms: of the steps that count, by WHATS."""

    warmup: int
    warmups: tuple[StepLine, ...]
    steps: tuple[StepLine, ...]
    peak: int
    ms: dict[str, Statistics]


def _ms(steps: Sequence[StepLine], what: str) -> list[float]:
    """Milliseconds of one of WHATS in each step."""
    times = [{"forward": step.forward_ns, "backward": step.backward_ns or 0, "step": step.ns}[what] for step in steps]
    return [ns / 1e6 for ns in times]


def arms(lines: Sequence[Line]) -> list[Arm]:
    """One for each process that has a step that counts, in their order."""
    found = []
    forward_only = any(line.settings.forward_only for line in lines if isinstance(line, TransformerLine))
    for process in (line for line in lines if isinstance(line, ProcessLine)):
        steps = [line for line in lines if isinstance(line, StepLine) and line.warmup == process.warmup]
        ends = [line.peak for line in lines if isinstance(line, EndLine) and line.warmup == process.warmup]
        counted = tuple(step for step in steps if step.step >= 0)
        if counted:
            warm = tuple(step for step in steps if step.step < 0)
            ms = {what: Statistics.of(_ms(counted, what)) for what in (WHATS[:1] if forward_only else WHATS)}
            found.append(Arm(process.warmup, warm, counted, ends[0] if ends else 0, ms))
    return found


def view(lines: Sequence[Line]) -> View | None:
    """None where there is no step that counts."""
    head = next((line for line in lines if isinstance(line, TransformerLine)), None)
    found = arms(lines)
    if head is None or not found:
        return None
    process = next(line for line in lines if isinstance(line, ProcessLine))
    warning = disturbed(lines)
    grids = [times_grid(head, found[-1])] if len(head.warmups) == 1 else study_grids(found)
    facts = [
        ("model", head.settings.size.text),
        ("parameters", count(sum(parameters(head.settings.size).values()))),
        ("device", f"{process.device}, {process.threads} threads"),
        *check_pairs(found, warning),
        *run_pairs(head),
    ]
    return View(
        "transformer", verdict(head, found), facts, grids, rows(head, found), picture(head, found, warning), warning
    )


def verdict(head: TransformerLine, found: Sequence[Arm]) -> str:
    last = found[-1]
    texts = [f"{what} {mean_and_std(ms)} ms" for what in WHATS[:2] if (ms := last.ms.get(what))]
    text = f"{head.settings.size.name}: {', '.join(texts)}"
    if len(found) > 1:
        # a forward alone is the whole step
        first, end = (list(arm.ms.values())[-1].mean for arm in (found[0], last))
        text += f"; with {found[0].warmup} warm-ups the mean step is {ratio(first / end)} times that with {last.warmup}"
    return text


def times_grid(head: TransformerLine, arm: Arm) -> Grid:
    """A row for forward, backward and both; rates at the median."""
    size, lines = head.settings.size, []
    for what, ms in arm.ms.items():
        seconds = ms.median / 1e3
        flops = _WORK[what] * forward_flops(size)
        lines.append((what, *statistics_cells(ms), count(size.tokens / seconds), number(flops / seconds / 1e9)))
    warm = f"{_title(arm)} before {len(arm.steps)} steps that count"
    if arm.warmups:
        warm += f", the first {number(arm.warmups[0].ns / 1e6)} ms"
    peak = f"; at most {format_bytes(arm.peak)} of memory" if arm.peak else ""
    return Grid(size.name, (warm + peak,), ("", *STATISTICS, "tokens/s", "GFLOP/s"), tuple(lines))


def study_grids(found: Sequence[Arm]) -> list[Grid]:
    """For forward, backward and both: a row for each number of warm-ups."""
    grids: list[Grid] = []
    last = found[-1]
    for what, most in last.ms.items():
        lines = []
        for arm in found:
            ms, first = arm.ms[what], _ms(arm.steps[:1], what)
            cells = map(number, (ms.mean, ms.std, ms.min, ms.max, ms.median, *first))
            lines.append((_title(arm), *cells, f"{ms.mean / most.mean:.3f}"))
        heading = f"mean over that of {last.warmup}"
        headings = ("", "mean ms", "std", "min", "max", "median", "first that counts", heading)
        note = (f"each in a fresh process, {len(last.steps)} steps that count",)
        grids.append(Grid(what, note, headings, tuple(lines)))
    return grids


def check_pairs(found: Sequence[Arm], warning: str = "") -> list[tuple[str, str]]:
    """The result of the independent loop, where it ran. warning: of a disturbed run."""
    steps = [step for arm in found for step in arm.steps if step.loop_ns is not None]
    if not steps:
        return []
    off = agreement(steps) - 1
    text = f"the median step is {100 * off:+.2f} % off that of an independent loop, in turn"
    if abs(off) <= TOLERANCE:
        return [("check", f"PASS {text}")]
    return [
        ("check", f"FAIL {text}" + ("; it may be the other programs: measure again without them" if warning else ""))
    ]


def rows(head: TransformerLine, found: Sequence[Arm]) -> list[dict[str, object]]:
    """A row for each process and what it timed: milliseconds."""
    size = head.settings.size
    names = ("d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "context_length", "batch_size", "dtype")
    about: dict[str, object] = {"model": size.name, **{name: getattr(size, name) for name in names}}
    return [
        {**about, "warmup_steps": arm.warmup, "what": what, "unit": "ms", **statistics_row(ms)}
        for arm in found
        for what, ms in arm.ms.items()
    ]


def picture(head: TransformerLine, found: Sequence[Arm], warning: str = "") -> bytes:
    """A PNG: a panel for each process, its steps from left to right, warm-ups hollow, medians as lines."""
    from matplotlib.figure import Figure

    width = 11 if len(found) > 1 else 8
    figure = Figure(figsize=(width, 3.9), dpi=150)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.62 / width, right=0.985, top=0.72, bottom=0.15, wspace=0.06)
    for axes, arm in zip(panels, found, strict=True):
        _panel(axes, arm)
    most = max(ms for arm in found for what in _COLOURS for ms in _ms((*arm.warmups, *arm.steps), what))
    panels[0].set_ylim(-0.03 * most, 1.08 * most)
    panels[0].set_ylabel("ms", color=QUIET, fontsize=9)
    figure.text(0.62 / width, 0.955, head.settings.size.text, fontsize=9, color=INK, va="top")
    shown = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    place: dict[str, Any] = {"bbox_to_anchor": (0.5 / width, 0.92), "ncols": 3}
    legend(figure, list(shown.values()), list(shown), handletextpad=0.3, **place)
    return png(figure, warning)


def _title(arm: Arm) -> str:
    return many(arm.warmup, "warm-up")


def _panel(axes: Axes, arm: Arm) -> None:
    from matplotlib.ticker import MaxNLocator

    bare(axes, _title(arm), "y")
    label_x(axes, "step")
    for what, colour in _COLOURS.items():
        ms = arm.ms.get(what)
        if ms is None:
            continue
        for steps, face in ((arm.warmups, "none"), (arm.steps, colour)):
            label = f"{what}{'' if face == colour else ', warm-up'}"
            values, places = _ms(steps, what), [step.step for step in steps]
            style: dict[str, Any] = {"s": 26, "linewidths": 1.3, "edgecolors": colour, "facecolors": face}
            axes.scatter(places, values, label=label if values else None, **style)
        axes.axhline(ms.median, color=colour, linewidth=0.9, alpha=0.6, zorder=0, label=f"{what}, median of the steps")
    axes.axvline(-0.5, color=RULE, linewidth=1)
    axes.set_xlim(-len(arm.warmups) - 0.8, len(arm.steps) - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
