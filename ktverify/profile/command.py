"""`python -m ktverify profile`: parses, measures, prints. Light until it is called: help needs no torch."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktverify.bench.command import INTERRUPTED

if TYPE_CHECKING:
    from ktverify.cases import Case
    from ktverify.profile.measure import Profiler
    from ktverify.profile.record import Line, ProfileLine

DEFAULT_CASE = "E=16,k=4,H=2048,I=768,T=128,r=16"
READ_BYTES = 1 << 28  # what the bandwidth is measured on, well beyond any cache


def profile(
    case: Annotated[str, typer.Argument(metavar="[CASE]", help="a case as repro takes it")] = DEFAULT_CASE,
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
    with its busy and idle time; what Python adds. Written: profile.jsonl (every call), profile.md, profile.png, and
    trace.json, a lane per worker, for ui.perfetto.dev. With the nvtx package, the ranges are NVTX ranges too.
    docs/profile.md says what to do about what you see. Ctrl-C leaves what was measured.

    \b
    Examples:  python -m ktverify profile
               python -m ktverify profile E=64,k=6,H=2048,I=1408,T=512,r=16 --tp 2
               python -m ktverify profile small --threads 1 --repeats 50
    """
    from ktverify.cases import Case
    from ktverify.profile import record

    if show is not None:
        _conclude(show, record.read(show), as_json)
        return
    from ktverify.bench.journal import LineFile, new_directory
    from ktverify.profile.measure import Profiler, Settings

    parsed = Case.parse(case)
    if parsed.qlen == 0:
        raise ValueError(f"case {parsed.id}: T is 0, there is nothing to time")
    profiler = Profiler(parsed, Settings(isa=isa, tp=tp, threads=threads, warmup=warmup, repeats=repeats))
    about = profiler.about()
    directory = out if out is not None else new_directory("profile")
    lines: list[Line] = [_head(directory, parsed, tp, about)]
    # a terminated run ends like an interrupted one
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    file, stopped = LineFile(directory / record.FILE), False
    try:
        file.write(lines[0])
        _measure(profiler, lines, file)
    except KeyboardInterrupt:
        stopped = True
        typer.echo("stopped; what was measured is kept", err=True)
    finally:
        file.close()
    _conclude(directory, lines, as_json)
    if stopped:
        raise typer.Exit(INTERRUPTED)


def _measure(profiler: Profiler, lines: list[Line], file: Any) -> None:
    """Each line into the file and behind `lines`, the moment it is made."""
    from rich.progress import track

    from ktverify.bench.quiet import Neighbours
    from ktverify.profile.record import QuietLine
    from ktverify.report.console import make_console

    console = make_console(stderr=True)
    shown = track(
        profiler.lines(),
        "profiling",
        profiler.calls(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    neighbours = Neighbours(list)
    before = neighbours.read()
    for line in shown:
        lines.append(line)
        file.write(line)
    lines.append(QuietLine(others=before.share_until(neighbours.read())))
    file.write(lines[-1])


def _head(directory: Path, case: Case, tp: int, about: dict[str, Any]) -> ProfileLine:
    from ktverify import machine
    from ktverify.bench import ceilings
    from ktverify.profile.record import ProfileLine

    found = ceilings.measure(about["workers"], about["isa"], READ_BYTES)
    return ProfileLine(
        stamp=directory.name,
        command=shlex.join(["python", "-m", "ktverify", *sys.argv[1:]]),
        commit=machine.git_commit(),
        machine=machine.read_machine(),
        case=case.id,
        why=case.why,
        isa=about["isa"],
        tp=tp,
        workers=about["workers"],
        read=float(found["read"]),
        multiply=float(found["multiply"]),
    )


def _conclude(directory: Path, lines: list[Line], as_json: bool) -> None:
    """Write the pages and the trace, then print. ValueError for a profile that was stopped before it had anything."""
    from ktverify.bench.console import print_grid
    from ktverify.files import write_whole
    from ktverify.profile import picture, record, tables, trace
    from ktverify.profile.summary import summarise
    from ktverify.report.console import make_console, print_pairs

    head = next((line for line in lines if isinstance(line, record.ProfileLine)), None)
    summaries = summarise(lines)
    others = next((line.others for line in lines if isinstance(line, record.QuietLine)), 0.0)
    if head is None or not summaries:
        raise ValueError(f"{directory / record.FILE} has no range that was measured to a steady call")
    names = [record.FILE, "profile.md", "trace.json"]
    # the files first: a terminal or a pipe may be gone by now
    write_whole(directory / "profile.md", tables.markdown(head, summaries, others))
    write_whole(directory / "trace.json", trace.trace(lines))
    if picture.draw(head, summaries, directory / "profile.png"):
        names.append("profile.png")
    if as_json:
        for line in lines:
            typer.echo(line.model_dump_json())
        return
    console = make_console()
    console.print(tables.verdict(summaries), style="bold")
    for grid in (tables.ranges_grid(head, summaries, others), *tables.stage_grids(head, summaries)):
        console.print()
        print_grid(console, grid)
    console.print()
    print_pairs(console, tables.head_pairs(head))
    for name in names:
        typer.echo(str(directory / name))
