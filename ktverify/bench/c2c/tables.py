"""The tables of `bench c2c` and `bench analyze`: TSV and CSV with a row per prompt, and grids. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from ktverify.bench.c2c.record import STAGE_FIELDS, PromptRecord, PromptTiming
from ktverify.report.grid import Grid, delimited
from ktverify.report.numbers import many, number, percent
from ktverify.system.timing import PERCENTILES, Statistics

STEP = "decode_step_times_ms"
# the single numbers of a prompt: its total and all fields of its timing but the list of steps
COLUMNS = ("total_ms", *(name for name in PromptTiming.model_fields if name != STEP))
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
    """Statistics over the prompts of each of COLUMNS, and over all steps of decoding. ValueError without records."""
    found = {name: Statistics.of([getattr(record.timing, name) for record in records]) for name in COLUMNS}
    steps = step_times(records)
    return {**found, STEP: Statistics.of(steps)} if steps else found


def step_times(records: Sequence[PromptRecord]) -> list[float]:
    return [step for record in records for step in record.timing.decode_step_times_ms]


def slowest(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """The ten records that took longest, the longest first."""
    return sorted(records, key=lambda record: (-record.timing.total_ms, record.id))[:SLOWEST]


def distribution_grid(records: Sequence[PromptRecord], notes: Sequence[str] = ()) -> Grid:
    """A row for each of COLUMNS; notes: which models, where."""
    headings = ("", "mean", "std", "median", "min", "max", *(f"p{share}" for share in PERCENTILES))
    rows = []
    for name, found in distribution(records).items():
        values = (found.mean, found.std, found.median, found.min, found.max, *found.percentiles.values())
        rows.append((name, *map(figure, values)))
    title = f"{many(len(records), 'prompt')}, {many(len(step_times(records)), 'token')}"
    return Grid(title, tuple(notes), headings, tuple(rows))


def prompts_grid(title: str, records: Sequence[PromptRecord]) -> Grid:
    """A row per prompt: milliseconds of both models' embedding and prefill, of projectors and decoding; the tokens."""
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
        share = percent(total / timing.total_ms if timing.total_ms else 0.0)
        rows.append((_STAGES[name], figure(total), share, str(calls), figure(total / calls if calls else 0.0)))
    rows.append(("all", figure(timing.total_ms), percent(1.0), "", ""))
    return Grid("where the time went", tuple(notes), ("stage", "ms", "share", "calls", "ms a call"), tuple(rows))


def _calls(timing: PromptTiming, stage: str) -> int:
    return int(getattr(timing, _CALLS[stage])) if stage in _CALLS else 1


def progress_line(record: PromptRecord) -> str:
    timing = record.timing
    return f"id {record.id}: {timing.num_generated_tokens} tokens, {figure(timing.total_ms)} ms"


def figure(value: float) -> str:
    """Like `number`, but counts, which are whole, without decimals."""
    return f"{value:.0f}" if value == int(value) else number(value)


def short(text: str, width: int = 48) -> str:
    """The beginning of a text on one line; control characters of terminals become dots."""
    line = "".join(letter if letter.isprintable() else "·" for letter in " ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"
