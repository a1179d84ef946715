"""Records as tables: TSV and CSV with a row a prompt, and grids of text for the console and Markdown.

Comes in: records. Goes out: text. No torch here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ktverify.bench.c2c.record import STAGE_FIELDS, PromptRecord, PromptTiming
from ktverify.bench.tables import Grid
from ktverify.system.clock import PERCENTILES, Statistics

# what of a prompt is one number; all but total_ms stand in the record
COLUMNS = (
    "total_ms",
    "base_embedding_ms",
    "base_prefill_ms",
    "teacher_embedding_ms",
    "teacher_prefill_ms",
    "projector_total_ms",
    "projector_avg_ms",
    "projector_calls",
    "decode_total_ms",
    "decode_avg_ms",
    "num_generated_tokens",
    "tokens_per_second",
)
STEP = "decode_step_times_ms"
SLOWEST = 10
_STAGES = {
    "base_embedding_ms": "base, embedding",
    "base_prefill_ms": "base, prefill",
    "teacher_embedding_ms": "teacher, embedding",
    "teacher_prefill_ms": "teacher, prefill",
    "projector_total_ms": "projectors",
    "decode_total_ms": "decoding",
}
_CALLS = {"projector_total_ms": "projector_calls", "decode_total_ms": "num_generated_tokens"}


def delimited(records: Sequence[PromptRecord], delimiter: str) -> str:
    """A row a prompt: id, COLUMNS, both models, prompt, response; cells with line breaks are quoted."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["id", *COLUMNS, "base_model", "teacher_model", "prompt", "response"])
    for record in records:
        numbers = [_exact(getattr(record.timing, name)) for name in COLUMNS]
        models = (record.models.base_model, record.models.teacher_model)
        writer.writerow([record.id, *numbers, *models, record.prompt, record.response])
    return stream.getvalue()


def distribution(records: Sequence[PromptRecord]) -> dict[str, Statistics]:
    """Statistics over the prompts of each of COLUMNS, and over all steps of decoding. ValueError without records."""
    found = {name: Statistics.of([getattr(record.timing, name) for record in records]) for name in COLUMNS}
    steps = step_times(records)
    return {**found, STEP: Statistics.of(steps)} if steps else found


def step_times(records: Sequence[PromptRecord]) -> list[float]:
    return [step for record in records for step in record.timing.decode_step_times_ms]


def slowest(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """The SLOWEST records that took longest, the longest first."""
    return sorted(records, key=lambda record: (-record.timing.total_ms, record.id))[:SLOWEST]


def distribution_grid(records: Sequence[PromptRecord], notes: Sequence[str] = ()) -> Grid:
    """A row for each of COLUMNS; notes: which models, where."""
    headings = ("", "mean", "std", "median", "min", "max", *(f"p{share}" for share in PERCENTILES))
    rows = []
    for name, found in distribution(records).items():
        values = (found.mean, found.std, found.median, found.min, found.max, *found.percentiles.values())
        rows.append((name, *map(figure, values)))
    title = f"{_many(len(records), 'prompt')}, {_many(len(step_times(records)), 'token')}"
    return Grid(title, tuple(notes), headings, tuple(rows))


def prompts_grid(title: str, records: Sequence[PromptRecord]) -> Grid:
    """A row a prompt: milliseconds of both models' embedding and prefill, of projectors and decoding; the tokens."""
    headings = ("id and prompt", "total ms", "base", "teacher", "projectors", "decoding", "tokens", "tokens/s")
    width = max(len(str(record.id)) for record in records)
    return Grid(title, (), headings, tuple(_prompt_row(record, width) for record in records))


def _prompt_row(record: PromptRecord, width: int) -> tuple[str, ...]:
    timing = record.timing
    base = timing.base_embedding_ms + timing.base_prefill_ms
    teacher = timing.teacher_embedding_ms + timing.teacher_prefill_ms
    parts = (timing.total_ms, base, teacher, timing.projector_total_ms, timing.decode_total_ms)
    tokens = (str(timing.num_generated_tokens), figure(timing.tokens_per_second))
    return (f"{record.id:{width}}  {short(record.prompt)}", *map(figure, parts), *tokens)


def stage_grid(timing: PromptTiming, notes: Sequence[str] = ()) -> Grid:
    """Where one prompt's time went."""
    rows = []
    for name in STAGE_FIELDS:
        total, calls = getattr(timing, name), _calls(timing, name)
        share = 100 * total / timing.total_ms if timing.total_ms else 0.0
        rows.append((_STAGES[name], figure(total), f"{share:.1f}", str(calls), figure(total / calls if calls else 0.0)))
    rows.append(("all", figure(timing.total_ms), "100.0", "", ""))
    return Grid("where the time went", tuple(notes), ("stage", "ms", "%", "calls", "ms a call"), tuple(rows))


def _calls(timing: PromptTiming, stage: str) -> int:
    return int(getattr(timing, _CALLS[stage])) if stage in _CALLS else 1


def markdown(grids: Sequence[Grid]) -> str:
    """The grids as a page of Markdown."""
    parts = []
    for grid in grids:
        align = ["---", *["---:"] * (len(grid.headings) - 1)]
        lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in (grid.headings, align, *grid.rows)]
        parts.append("\n".join([f"## {grid.title}", "", *(f"{note}\n" for note in grid.notes), *lines]))
    return "\n\n".join(parts) + "\n"


def figure(value: float) -> str:
    """Three significant digits down to a thousandth; from 100 on whole."""
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def short(text: str, width: int = 48) -> str:
    """The beginning of a text on one line; characters that would steer a terminal become dots."""
    line = "".join(letter if letter.isprintable() else "·" for letter in " ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _exact(value: float) -> str:
    """Twelve digits: all that a clock gave, without what binary fractions add."""
    return f"{value:.12g}"
