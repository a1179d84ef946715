"""`bench c2c single`: time one prompt and write its record, TSV, traces, operators and picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from ktverify.bench.c2c import operators, picture, store, tables
from ktverify.bench.c2c.record import C2cSettings, PromptRecord
from ktverify.bench.c2c.run import PromptRun, check, load
from ktverify.bench.c2c.trace import trace
from ktverify.report.console import make_console, print_grids
from ktverify.system.files import write_whole


@dataclass(frozen=True)
class Single:
    """What was measured, and the paths of the files that have it."""

    record: PromptRecord
    profile: operators.OperatorProfile | None
    written: tuple[Path, ...]


def run_single(
    settings: C2cSettings, prompt: str, projectors: Path | None, path: Path, *, warmups: int, profile_tokens: int
) -> Single:
    """Time `prompt`, write all files, profile it where profile_tokens is above 0. ValueError: see PromptRun, load."""
    check(settings)
    run = PromptRun(settings, [prompt], path)
    try:
        pipeline = load(settings, projectors)
        record, timeline = next(run.records(lambda: pipeline, warmups))
    finally:
        run.close()
    written = [path, store.info_path(path)]

    def add(ending: str, content: str | bytes) -> None:
        written.append(write_whole(store.beside(path, ending), content))

    add(".tsv", tables.prompt_table([record], "\t"))
    add(".trace.json", trace(record, timeline.calls))
    add(".png", picture.draw_timeline(record, timeline.calls))
    found = None
    if profile_tokens:
        found = operators.profile(pipeline, prompt, profile_tokens, settings.device)
        add(".operators.tsv", operators.table(found))
        add(".operators.trace.json", found.trace)
    return Single(record, found, tuple(written))


def show_single(found: Single) -> None:
    """The verdict, the response, where the time went, which operators it went to."""
    console, timing = make_console(), found.record.timing
    head = f"{timing.num_generated_tokens} tokens in {tables.figure(timing.total_ms)} ms"
    speed = f"{tables.figure(timing.tokens_per_second)} tokens/s in decoding"
    console.print(Text(f"{head}, {speed}", style="bold"))
    console.print(Text(tables.short(found.record.response, 160) or "(an empty response)"))
    console.print()
    grids = [tables.stage_grid(timing, store.busy_notes(found.written[:1]))]
    if found.profile is not None:
        grids.append(operators.grid(found.profile))
    print_grids(console, grids, found.written)
