"""`python -m ktverify profile`: parses, measures, prints. Light until it is called: help needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli.bench_layer import DEFAULT_CASE
from ktverify.errors import NothingMeasured
from ktverify.isolation.interrupt import INTERRUPTED

if TYPE_CHECKING:
    from ktverify.bench.layer.profile_record import Line


def profile(
    case: Annotated[str, typer.Argument(metavar="CASE", help="a case as repro takes it")] = DEFAULT_CASE,
    isa: Annotated[str | None, typer.Option(help="force an instruction set; refused where it cannot run")] = None,
    tp: Annotated[int, typer.Option(help="tensor-parallel degree", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="at most so many threads", min=1)] = None,
    warmup: Annotated[int, typer.Option(help="calls of each range that don't count", min=0)] = 3,
    repeats: Annotated[int, typer.Option(help="calls of each range that do, recorded and plain each", min=1)] = 15,
    out: Annotated[
        Path | None, typer.Option(help="where it is written (default: reports/runs/<stamp>-profile)")
    ] = None,
    show: Annotated[
        Path | None, typer.Option(help="measure nothing: print and draw this earlier profile again")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the JSON lines instead of the tables")] = False,
) -> None:
    """Where the time of a forward, a backward and a training step of the native engine goes.

    Each stage with its share, its distance from the machine's roofline, and its time in the first call; each worker
    with its busy and idle time; what Python adds. Written: profile.jsonl (every call), .md, .html, .tsv, .png, and
    trace.json, a lane per worker, for ui.perfetto.dev. With the nvtx package, the ranges are NVTX ranges too.
    docs/profile.md says what to do about what you see. Ctrl-C leaves what was measured.

    \b
    Examples:  python -m ktverify profile
               python -m ktverify profile E=64,k=6,H=2048,I=1408,T=512,r=16 --tp 2
               python -m ktverify profile small --threads 1 --repeats 50
    """
    from ktverify.bench.layer import profile_record
    from ktverify.spec.cases import Case

    if show is not None:
        _conclude(show, profile_record.read(show), as_json)
        return
    from ktverify.bench.layer.profile import Profiler, ProfileSettings
    from ktverify.bench.timed_run import RunLine, collect, if_there_is_any
    from ktverify.runs.jsonl import new_directory

    parsed = Case.parse(case)
    if parsed.qlen == 0:
        raise ValueError(f"case {parsed.id}: T is 0, there is nothing to time")
    profiler = Profiler(parsed, ProfileSettings(isa=isa, tp=tp, threads=threads, warmup=warmup, repeats=repeats))
    directory = out if out is not None else new_directory("profile")
    head = profile_record.ProfileLine(
        **RunLine.facts(directory), case=parsed.id, why=parsed.why, tp=tp, **profiler.about
    )
    lines, stopped = collect(directory / profile_record.FILE, head, profiler.lines(), profiler.steps(), "profiling")
    with if_there_is_any(stopped):
        _conclude(directory, lines, as_json)
    if stopped:
        raise typer.Exit(INTERRUPTED)


def _conclude(directory: Path, lines: list[Line], as_json: bool) -> None:
    """Write the pages and the trace, then print. ValueError for a profile that was stopped before it had anything."""
    from ktverify.bench.layer import profile_picture, profile_record, profile_tables, profile_trace
    from ktverify.bench.layer.profile_summary import ProfileSummary
    from ktverify.report import pages
    from ktverify.system.files import write_whole

    summary = ProfileSummary.of(lines)
    if summary is None:
        raise NothingMeasured(f"{directory / profile_record.FILE} has no range that was measured to a steady call")
    view = profile_tables.view(summary, profile_picture.draw(summary))
    write_whole(directory / "trace.json", profile_trace.trace(lines))
    pages.conclude(view, lines, directory / profile_record.FILE, as_json, extra=["trace.json"])
