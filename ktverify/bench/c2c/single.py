"""`bench c2c single`: time one prompt and write its record, TSV, traces, picture, and which operators its time goes to.

Profiling takes time itself: torch's profiler runs few tokens after the timed run, and none of its times goes into a
record.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from ktverify.bench.c2c import store, views
from ktverify.bench.c2c.pipeline import Pipeline
from ktverify.bench.c2c.record import C2cSettings, PromptRecord
from ktverify.bench.c2c.run import PromptRun, check, load
from ktverify.report.console import make_console, print_grids
from ktverify.report.grid import Grid, delimited
from ktverify.report.numbers import number, percent
from ktverify.system.files import write_whole
from ktverify.system.timing import Timeline

OPERATORS_SHOWN = 10


@dataclass(frozen=True)
class Operator:
    """self_ms: without the operators that it calls, on the GPU where there is one; total_ms: with them, on the CPU."""

    operator: str
    calls: int
    self_ms: float
    total_ms: float
    share: float


@dataclass(frozen=True)
class OperatorProfile:
    """Operators, the one that took longest first, over `tokens` new tokens; trace: the profiler's, with the stages."""

    operators: tuple[Operator, ...]
    tokens: int
    trace: bytes


def run_single(
    settings: C2cSettings, prompt: str, projectors: Path | None, path: Path, *, warmups: int, profile_tokens: int
) -> tuple[PromptRecord, OperatorProfile | None, list[Path]]:
    """Time `prompt`, write all files, profile it where profile_tokens is above 0; returns the paths of the files last.

    ValueError: see PromptRun, load.
    """
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

    add(".tsv", views.prompt_table([record], "\t"))
    add(".trace.json", views.trace(record, timeline.calls))
    add(".png", views.draw_timeline(record, timeline.calls, store.warning([path])))
    found = None
    if profile_tokens:
        found = profile(pipeline, prompt, profile_tokens, settings.device)
        add(".operators.tsv", delimited([asdict(row) for row in found.operators]))
        add(".operators.trace.json", found.trace)
    return record, found, written


def profile(pipeline: Pipeline, prompt: str, tokens: int, device: str) -> OperatorProfile:
    """Run `prompt` under the profiler for at most `tokens` new tokens."""
    # else the profiler writes lines of its own to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch import profiler

    activities = [profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(profiler.ProfilerActivity.CUDA)
    with profiler.profile(activities=activities) as found:
        response = pipeline.run(prompt, tokens, Timeline(device, annotate=profiler.record_function))
    averages = [average for average in found.key_averages() if average.key not in views.LANES]
    with tempfile.TemporaryDirectory() as place:
        # the profiler writes to a path only
        path = Path(place) / "trace.json"
        found.export_chrome_trace(str(path))
        return OperatorProfile(_operators(averages, device), len(response.tokens), path.read_bytes())


def _operators(averages: list[Any], device: str) -> tuple[Operator, ...]:
    own = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    total = sum(getattr(average, own) for average in averages) or 1
    rows = [
        Operator(a.key, int(a.count), getattr(a, own) / 1e3, a.cpu_time_total / 1e3, getattr(a, own) / total)
        for a in averages
    ]
    return tuple(sorted(rows, key=lambda row: (-row.self_ms, row.operator)))


def show_single(record: PromptRecord, found: OperatorProfile | None, written: Sequence[Path]) -> None:
    """The verdict, the response, where the time went, which operators it went to."""
    console, timing = make_console(), record.timing
    head = f"{timing.num_generated_tokens} tokens in {views.figure(timing.total_ms)} ms"
    speed = f"{views.figure(timing.tokens_per_second)} tokens/s in decoding"
    warning = store.warning(written[:1])
    console.print(Text(f"{head}, {speed}{' (disturbed)' if warning else ''}", style="bold"))
    console.print(Text(views.short(record.response, 160) or "(an empty response)"))
    console.print()
    grids = [views.stage_grid(timing, [warning] if warning else [])]
    if found is not None:
        grids.append(operators_grid(found))
    print_grids(console, grids, written)


def operators_grid(found: OperatorProfile) -> Grid:
    """The operators that took longest."""
    rows = tuple(
        (row.operator, number(row.self_ms), percent(row.share), str(row.calls), number(1e3 * row.self_ms / row.calls))
        for row in found.operators[:OPERATORS_SHOWN]
    )
    title = f"operators, over {found.tokens} tokens in a separate run under the profiler"
    return Grid(title, (), ("operator", "self ms", "share", "calls", "µs a call"), rows)
