"""The views of `bench c2c` and `bench analyze`: TSV and CSV with a row per prompt, tables, PNGs, a trace. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ktverify.bench.c2c.record import STAGE_FIELDS, PromptRecord, PromptTiming
from ktverify.report import trace_events
from ktverify.report.grid import Grid, delimited
from ktverify.report.numbers import many, number, percent
from ktverify.report.style import BLUE, GREEN, INK, LILAC, ORANGE, PURPLE, bare, label_x, png
from ktverify.system.timing import PERCENTILES, Statistics, TimedCall

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP = "decode_step_times_ms"
# the single numbers of a prompt: its total and all fields of its timing but the list of steps
COLUMNS = ("total_ms", *(name for name in PromptTiming.model_fields if name != STEP))
SLOWEST = 10
# the stages of the pipeline, in the lane of the trace and of the picture that each belongs to
LANES = {
    "base_embedding": "base",
    "base_prefill": "base",
    "teacher_embedding": "teacher",
    "teacher_prefill": "teacher",
    "projector": "projectors",
    "decode_step": "decode",
}
_COLOURS = {"base": PURPLE, "teacher": ORANGE, "projectors": GREEN, "decode": BLUE}
# names of STAGE_FIELDS in the table, and the field with the number of calls where there are several
_STAGES = {"projector_total_ms": "projectors", "decode_total_ms": "decoding"}
_CALLS = {"projector_total_ms": "projector_calls", "decode_total_ms": "num_generated_tokens"}
# what the histograms show: their titles, and what they count
_PANELS = {
    "total_ms": ("a prompt, ms", "prompts"),
    STEP: ("a step of decoding, ms", "steps"),
    "tokens_per_second": ("tokens a second", "prompts"),
    "projector_total_ms": ("projectors of a prompt, ms", "prompts"),
}
# a histogram ends at so many times the way from the median to the 95th percentile
_FAR = 3


def figure(value: float) -> str:
    """Like `number`, but counts, which are whole, without decimals."""
    return f"{value:.0f}" if value == int(value) else number(value)


def short(text: str, width: int = 48) -> str:
    """The beginning of a text on one line; control characters of terminals become dots."""
    line = "".join(letter if letter.isprintable() else "·" for letter in " ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def progress_line(record: PromptRecord) -> str:
    return f"id {record.id}: {record.timing.num_generated_tokens} tokens, {figure(record.timing.total_ms)} ms"


def prompt_table(records: Sequence[PromptRecord], delimiter: str) -> str:
    """A row per prompt: id, COLUMNS, both models, prompt, response."""
    rows = [
        {
            "id": record.id,
            **{name: getattr(record.timing, name) for name in COLUMNS},
            **record.models.model_dump(),
            "prompt": record.prompt,
            "response": record.response,
        }
        for record in records
    ]
    return delimited(rows, delimiter)


def distribution(records: Sequence[PromptRecord]) -> dict[str, Statistics]:
    """Statistics over the prompts of each of COLUMNS, and over all steps of decoding."""
    return {name: Statistics.of(found) for name in (*COLUMNS, STEP) if (found := _values(records, name))}


def _values(records: Sequence[PromptRecord], name: str) -> list[float]:
    if name == STEP:
        return [step for record in records for step in record.timing.decode_step_times_ms]
    return [getattr(record.timing, name) for record in records]


def slowest(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """The ten records that took longest, the longest first."""
    return sorted(records, key=lambda record: (-record.timing.total_ms, record.id))[:SLOWEST]


# ---- tables


def distribution_grid(records: Sequence[PromptRecord], notes: Sequence[str] = ()) -> Grid:
    """A row for each of COLUMNS; notes: which models, where."""
    headings = ("", "mean", "std", "median", "min", "max", *(f"p{share}" for share in PERCENTILES))
    rows = []
    for name, found in distribution(records).items():
        values = (found.mean, found.std, found.median, found.min, found.max, *found.percentiles.values())
        rows.append((name, *map(figure, values)))
    title = f"{many(len(records), 'prompt')}, {many(len(_values(records, STEP)), 'token')}"
    return Grid(title, tuple(notes), headings, tuple(rows))


def prompts_grid(title: str, records: Sequence[PromptRecord], notes: Sequence[str] = ()) -> Grid:
    """A row per prompt: milliseconds of both models' embedding and prefill, of projectors and decoding; the tokens."""
    rows = []
    width = max(len(str(record.id)) for record in records)
    for record in records:
        timing = record.timing
        rows.append(
            {
                "id and prompt": f"{record.id:{width}}  {short(record.prompt)}",
                "total ms": figure(timing.total_ms),
                "base": figure(timing.base_embedding_ms + timing.base_prefill_ms),
                "teacher": figure(timing.teacher_embedding_ms + timing.teacher_prefill_ms),
                "projectors": figure(timing.projector_total_ms),
                "decoding": figure(timing.decode_total_ms),
                "tokens": str(timing.num_generated_tokens),
                "tokens/s": figure(timing.tokens_per_second),
            }
        )
    return Grid.of(rows, title, notes=notes)


def stage_grid(timing: PromptTiming, notes: Sequence[str] = ()) -> Grid:
    """Where one prompt's time went."""
    rows = []
    for name in STAGE_FIELDS:
        title = _STAGES.get(name) or name.removesuffix("_ms").replace("_", ", ")
        total, calls = getattr(timing, name), int(getattr(timing, _CALLS[name])) if name in _CALLS else 1
        share = percent(total / timing.total_ms if timing.total_ms else 0.0)
        rows.append((title, figure(total), share, str(calls), figure(total / calls if calls else 0.0)))
    rows.append(("all", figure(timing.total_ms), percent(1.0), "", ""))
    return Grid("where the time went", tuple(notes), ("stage", "ms", "share", "calls", "ms a call"), tuple(rows))


# ---- pictures, as PNGs


def draw_timeline(record: PromptRecord, calls: Sequence[TimedCall], warning: str = "") -> bytes:
    """On the left the stages up to the first new token, a lane each; on the right the time of each decoding step."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 2.7), dpi=110, layout="constrained")
    title = f"{short(record.prompt, 60)}  {figure(record.timing.total_ms)} ms"
    page.suptitle(title, x=0.012, ha="left", fontsize=10, color=INK, parse_math=False)
    left, right = page.subplots(1, 2, width_ratios=(3, 2))
    _lanes(left, calls)
    _steps(right, record.timing.decode_step_times_ms)
    return png(page, warning)


def _lanes(axes: Axes, calls: Sequence[TimedCall]) -> None:
    lanes = list(dict.fromkeys(LANES.values()))
    shown = [call for call in calls if call.name != "decode_step" or call.number == 0]
    begin = min(call.at for call in shown)
    for call in shown:
        lane = LANES[call.name]
        # the calls of one stage follow each other: every other one is paler, so that each is seen
        alpha = 0.55 if call.number % 2 else 1.0
        axes.barh(lanes.index(lane), call.ns / 1e6, left=(call.at - begin) / 1e6, color=_COLOURS[lane], alpha=alpha)
    bare(axes, "until the first new token")
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    took = {lane: sum(call.ns for call in shown if LANES[call.name] == lane) / 1e6 for lane in lanes}
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


def draw_histogram(records: Sequence[PromptRecord], warning: str = "") -> bytes:
    """Four distributions; a line at the median, a dashed one at the 95th percentile. Values far beyond it are counted
    in the title and not drawn: they would squeeze the others."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 4.4), dpi=110, layout="constrained")
    for axes, (name, (title, counted)) in zip(page.subplots(2, 2).flat, _PANELS.items(), strict=True):
        _histogram(axes, title, counted, _values(records, name))
    return png(page, warning)


def _histogram(axes: Axes, title: str, counted: str, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    if not values:
        bare(axes, f"{title}: none")
        return
    found = Statistics.of(values)
    high = found.percentiles[95]
    shown = [value for value in values if value <= found.median + _FAR * (high - found.median)]
    bins = min(40, max(5, math.ceil(math.sqrt(len(shown)))))
    axes.hist(shown, bins=bins, color=LILAC, edgecolor="white", linewidth=0.5)
    axes.axvline(found.median, color=INK, linewidth=1.2)
    axes.axvline(high, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    text = f"{title}: median {figure(found.median)}, p95 {figure(high)}, n = {found.count}"
    beyond = len(values) - len(shown)
    bare(axes, f"{text}\n{beyond} beyond, to {figure(found.max)}" if beyond else text, size=8.5)
    axes.set_ylabel(counted, fontsize=8.5)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def trace(record: PromptRecord, calls: Sequence[TimedCall]) -> str:
    """The timeline of one prompt as a Chrome trace: a lane each for base, teacher, projectors and decoding."""
    lanes = {lane: place for place, lane in enumerate(_COLOURS, start=trace_events.FIRST_LANE)}
    models = record.models.model_dump()
    events = [trace_events.title(f"{models['base_model']} taught by {models['teacher_model']}")]
    for name, lane in lanes.items():
        events += trace_events.lane(lane, name)
    for call in calls:
        lane = lanes[LANES[call.name]]
        events.append(trace_events.span(call.name, "c2c", lane, (call.at, call.ns), {"call": call.number}))
    about = {"id": record.id, "prompt": record.prompt, "response": record.response, **models}
    return trace_events.document(events, about)
