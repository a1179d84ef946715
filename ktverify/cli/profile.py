"""`python -m ktverify profile`: parse, measure, print. Help needs no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli import bench_options
from ktverify.cli.bench_layer import DEFAULT_CASE
from ktverify.cli.options import Isa, SomeCase, Threads, Tp

if TYPE_CHECKING:
    from ktverify.bench.layer.profile_record import Line


def profile(
    case: SomeCase = DEFAULT_CASE,
    isa: Isa = None,
    tp: Tp = 1,
    threads: Threads = None,
    warmup: Annotated[int, typer.Option(help="calls of each range that don't count", min=0)] = 3,
    repeats: Annotated[int, typer.Option(help="calls of each range that do, recorded and plain each", min=1)] = 15,
    out: bench_options.Out = None,
    show: bench_options.Show = None,
    as_json: bench_options.Lines = False,
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
    from ktverify.bench import timed_run
    from ktverify.bench.layer import profile_record
    from ktverify.spec.cases import Case

    if show is not None:
        _conclude(show, profile_record.read(show), as_json)
        return
    from ktverify.bench.layer.profile import Profiler, ProfileSettings

    parsed = Case.parse(case)
    if parsed.qlen == 0:
        raise ValueError(f"case {parsed.id}: T is 0, there is nothing to time")
    profiler = Profiler(parsed, ProfileSettings(isa=isa, tp=tp, threads=threads, warmup=warmup, repeats=repeats))
    code = timed_run.measure(
        "profile",
        profile_record.FILE,
        partial(profile_record.ProfileLine, case=parsed.id, why=parsed.why, tp=tp, **profiler.about),
        profiler.lines(),
        profiler.steps(),
        partial(_conclude, as_json=as_json),
        out,
    )
    raise typer.Exit(code)


def _conclude(directory: Path, lines: list[Line], as_json: bool) -> bool:
    """Write the views and the trace, then print. NothingMeasured for a profile without a steady call."""
    from ktverify.bench import timed_run
    from ktverify.bench.layer import profile_picture, profile_record, profile_views
    from ktverify.system.files import write_whole

    summary, view = profile_views.ProfileSummary.of(lines), None
    if summary is not None:
        view = profile_views.view(summary, profile_picture.draw(summary))
        write_whole(directory / "trace.json", profile_views.trace(lines))
    missing = "no range that was measured to a steady call"
    return timed_run.conclude(directory / profile_record.FILE, lines, view, missing, as_json, ["trace.json"])
