"""`python -m ktverify bench kernels`: parse, measure, print. Help needs no torch."""

from __future__ import annotations

import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli import options
from ktverify.cli.options import Isa, Threads

if TYPE_CHECKING:
    from ktverify.bench.kernels.record import Line


def kernels(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="TUNABLE", help="names or patterns of tunables, as --list prints them")
    ] = None,
    isa: Isa = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="rounds that count", min=1)] = 60,
    size: Annotated[str, typer.Option(help="rows x columns of a matrix of W, multiples of 32")] = "2048x7168",
    arena: Annotated[float, typer.Option(help="GiB of weights; more than any cache holds", min=0.01)] = 1.0,
    list_tunables: Annotated[bool, typer.Option("--list", help="list the tunables, and today's choices")] = False,
    out: options.Out = None,
    show: options.Show = None,
    as_json: options.Lines = False,
) -> None:
    """Time the kernels with today's constants beside kernels with others, and say which are better by more than 5 %.

    Needs a checkout and g++: each value is compiled, loaded into this process, and must compute the same bits. All
    values of a constant take turns in many short rounds, each on weights that no cache holds; the machine's read rate
    and register peak are measured in the same rounds. Minima are compared. Written: kernels.jsonl (every time), .md,
    .html, .tsv. Ctrl-C leaves what was measured.

    \b
    Examples:  python -m ktverify bench kernels
               python -m ktverify bench kernels 'nt*' --isa avx512_bf16 --rounds 200
               python -m ktverify bench kernels --size 1408x2048
    """
    from ktverify import _native
    from ktverify.bench import timed_run
    from ktverify.bench.kernels import record
    from ktverify.bench.kernels.measure import KernelSettings, KernelTimes
    from ktverify.bench.kernels.tunables import compiler, tunables
    from ktverify.system.limits import format_bytes, processors, require_memory

    if show is not None:
        _conclude(show, record.read(show), as_json)
        return
    chosen_isa = isa or str(_native.available_isas()[0])
    intel = None if list_tunables else _native.kernels_of(chosen_isa)[1]
    known = tunables(chosen_isa, intel=intel)
    chosen = [one for one in known if not names or any(fnmatch.fnmatchcase(one.name, name) for name in names)]
    if not chosen:
        there = "; ".join(one.name for one in known) or "none"
        raise ValueError(f"no tunable of {chosen_isa} is called {', '.join(names or ['anything'])}; there are: {there}")
    if list_tunables:
        for one in chosen:
            rows = ", ".join(map(str, one.rows))
            where = f" ({one.processors} processors)" if one.processors else ""
            typer.echo(f"{one.name}{where}: {one.today}; others: {'; '.join(one.others)}; at {rows} rows")
        return
    n, k = _size(size)
    # before other values are compiled, which takes minutes
    weights = int(arena * (1 << 30))
    if 2 * n * k > weights:
        raise ValueError(f"--arena is {arena:g}, and a matrix of --size {size} takes {format_bytes(2 * n * k)}")
    require_memory(weights, f"--arena {arena:g}", "take less")
    compiler()
    settings = KernelSettings(
        isa=chosen_isa,
        threads=min(threads or processors(), processors()),
        n=n,
        k=k,
        rounds=rounds,
        arena=weights,
    )
    times = KernelTimes(settings, chosen)
    head = partial(record.KernelsLine, isa=chosen_isa, threads=settings.threads, n=n, k=k)
    conclude = partial(_conclude, as_json=as_json)
    code = timed_run.measure("kernels", record.FILE, head, times.lines(), times.count(), conclude, out)
    raise typer.Exit(code)


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 9 for part in parts):
        raise ValueError(f"--size is {text!r}, it takes rows x columns, like 2048x7168")
    return int(parts[0]), int(parts[1])


def _conclude(directory: Path, lines: list[Line], as_json: bool) -> bool:
    """Write the views, then print. NothingMeasured for a run without a whole round."""
    from ktverify.bench import timed_run
    from ktverify.bench.kernels import record, views

    return timed_run.conclude(directory / record.FILE, lines, views.view(lines), "no whole round", as_json)
