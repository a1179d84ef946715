"""`python -m ktverify bench layer`, `bench sweep` and `profile`: parse, measure, print. Help needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli import options
from ktverify.cli.options import Isa, SomeCase, Threads, Tp
from ktverify.system.limits import processors

if TYPE_CHECKING:
    from ktverify.bench.layer import profile_record
    from ktverify.bench.layer.record import Line, Spot, Varied
    from ktverify.spec.cases import Case

DEFAULT_CASE = "E=16,k=4,H=2048,I=768,T=128,r=16"

_Warmup = Annotated[int, typer.Option(help="repeats that do not count", min=0)]
_Repeats = Annotated[int, typer.Option(help="repeats that do", min=1)]
_Steps = Annotated[int, typer.Option(help="training steps after them, for memory; 0: none", min=0)]


def layer(
    case: SomeCase = DEFAULT_CASE,
    tp: Annotated[str, typer.Option(help="tensor-parallel degrees; 1 always comes first")] = "1,2",
    batch_sizes: Annotated[str, typer.Option("--batch_sizes", help="sequences at a time, for throughput")] = "1,4",
    sequence_lengths: Annotated[
        str, typer.Option("--sequence_lengths", help="tokens a sequence, for throughput")
    ] = "32,128",
    isa: Isa = None,
    threads: Threads = None,
    warmup: _Warmup = 3,
    repeats: _Repeats = 15,
    steps: _Steps = 5,
    out: options.Out = None,
    show: options.Show = None,
    as_json: options.Lines = False,
) -> None:
    """Times of one layer: forward, backward, tensor parallelism, tokens/s, memory.

    Backward is timed alone, and as forward + backward with its forward subtracted. Every degree and every batch is
    measured in a process of its own, and its first results are compared with the fp32 oracle. Written: layer.jsonl
    (every repeat), .md, .html, .tsv, .png. Ctrl-C leaves what was measured.

    \b
    Examples:  python -m ktverify bench layer
               python -m ktverify bench layer E=64,k=6,H=2048,I=1408,T=512,r=16 --tp 1,2,4
               python -m ktverify bench layer --batch_sizes 1,2,4,8 --sequence_lengths 64,256,1024
    """
    from ktverify.bench.layer import record

    if show is not None:
        _conclude(show, record.read(show), as_json)
        return
    parsed = _timed(case)
    degrees = dict.fromkeys([1, *_numbers("--tp", tp)])
    plain = record.Spot(case=parsed.id, isa=isa, threads=threads, warmup=warmup, repeats=repeats, steps=steps)
    spots: list[record.Spot] = []

    def add(varied: Varied, value: int, chosen: Case, **more: int) -> None:
        # the case checks that the degree divides I
        text = replace(chosen, tp=(more.get("tp", 1),)).id
        fields = {"number": len(spots), "varied": varied, "value": value, "case": text, **more}
        spots.append(plain.model_copy(update=fields))

    for degree in degrees:
        add("tp", degree, parsed, tp=degree)
    for batch in _numbers("--batch_sizes", batch_sizes):
        for length in _numbers("--sequence_lengths", sequence_lengths):
            add("throughput", batch * length, replace(parsed, qlen=batch * length), batch=batch)
    _measure("layer", parsed, spots, out, as_json)


def sweep(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="WHAT", help="qlen, rank, threads, experts (default: all)")
    ] = None,
    case: Annotated[str, typer.Option(help="what is varied, a case as repro takes it")] = DEFAULT_CASE,
    values: Annotated[str | None, typer.Option(help="of one WHAT: 1,2,4 (default: some that suit it)")] = None,
    isa: Isa = None,
    threads: Threads = None,
    warmup: _Warmup = 3,
    repeats: _Repeats = 9,
    steps: _Steps = 1,
    out: options.Out = None,
    show: options.Show = None,
    as_json: options.Lines = False,
) -> None:
    """How a layer's cost grows over qlen, LoRA rank, threads and experts, beside its work.

    Each value is measured in a process of its own. Written: layer.jsonl (every repeat), sweep.md, .html, .tsv, .png.
    Ctrl-C leaves what was measured.

    \b
    Examples:  python -m ktverify bench sweep
               python -m ktverify bench sweep qlen --values 1,4,16,64,256,1024
               python -m ktverify bench sweep rank experts --case E=64,k=6,H=2048,I=1408,T=512,r=16
    """
    from ktverify.bench.layer import record

    if show is not None:
        _conclude(show, record.read(show), as_json)
        return
    parsed = _timed(case)
    chosen = [name for name in record.SWEEPS if name in (what or record.SWEEPS)]
    unknown = [name for name in what or () if name not in record.SWEEPS]
    if unknown:
        raise ValueError(f"nothing that can be varied is called {unknown[0]!r}; there are {', '.join(record.SWEEPS)}")
    if values is not None and len(chosen) != 1:
        raise ValueError(f"--values is for one of {', '.join(record.SWEEPS)}, {len(chosen)} are to be varied")
    plain = record.Spot(case=parsed.id, isa=isa, threads=threads, warmup=warmup, repeats=repeats, steps=steps)
    spots: list[record.Spot] = []
    for varied in chosen:
        # the engine takes no more workers than there are processors, so a larger value would time the same again
        most = processors()
        for value in _numbers("--values", values) if values is not None else _DEFAULTS[varied](parsed):
            fields = {"number": len(spots), "varied": varied, "value": value}
            if varied == "threads" and value > most:
                raise ValueError(f"--values has {value} threads, this process may run on {most} processors")
            change = {"threads": value} if varied == "threads" else {"case": _CHANGES[varied](parsed, value).id}
            spots.append(plain.model_copy(update={**fields, **change}))
    _measure("sweep", parsed, spots, out, as_json)


# (case, value) -> the case of that spot
_CHANGES: dict[str, Callable[[Case, int], Case]] = {
    "qlen": lambda case, value: replace(case, qlen=value),
    "rank": lambda case, value: replace(case, rank=value, alpha=2.0 * value),
    "experts": lambda case, value: replace(case, num_experts=value),
}
# case -> default values
_DEFAULTS: dict[str, Callable[[Case], list[int]]] = {
    "qlen": lambda case: [1, 4, 16, 64, 256],
    "rank": lambda case: [4, 8, 16, 32, 64],
    "threads": lambda case: _doubling(1, processors()),
    "experts": lambda case: _doubling(case.top_k, 4 * case.num_experts),
}


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, … and last."""
    found = [first]
    while found[-1] * 2 < last:
        found.append(found[-1] * 2)
    return list(dict.fromkeys([*found, last]))


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers from 1 on, between commas, each once, in the order given."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} is {text!r}, it takes whole numbers from 1 on with commas between, like 1,2,4")
    return list(dict.fromkeys(int(part) for part in parts))


def _timed(case: str) -> Case:
    from ktverify.spec.cases import Case

    parsed = Case.parse(case)
    if parsed.qlen == 0:
        raise ValueError(f"case {parsed.id}: T is 0, there is nothing to time")
    if parsed.data != "gaussian":
        raise ValueError(f"case {parsed.id}: its results are compared with fp32, which takes data=gaussian")
    return parsed


def _measure(kind: str, case: Case, spots: list[Spot], out: Path | None, as_json: bool) -> None:
    from ktverify.bench import timed_run
    from ktverify.bench.layer import measure, record

    measure.check_fits(spots)
    head = partial(record.LayerLine, case=case.id, spots=tuple(spots))
    measured = timed_run.lines_of_processes(measure.__name__, spots, record.Line)
    count = measure.line_count(spots)
    code = timed_run.measure(kind, record.FILE, head, measured, count, partial(_conclude, as_json=as_json), out)
    raise typer.Exit(code)


def _conclude(directory: Path, lines: list[Line], as_json: bool) -> bool:
    """Write the views, then print. NothingMeasured for a run without a repeat that counts."""
    from ktverify.bench import timed_run
    from ktverify.bench.layer import record, views

    return timed_run.conclude(directory / record.FILE, lines, views.view(lines), "no repeat that counts", as_json)


# ---- profile


def profile(
    case: SomeCase = DEFAULT_CASE,
    isa: Isa = None,
    tp: Tp = 1,
    threads: Threads = None,
    warmup: Annotated[int, typer.Option(help="calls of each range that don't count", min=0)] = 3,
    repeats: Annotated[int, typer.Option(help="calls of each range that do, recorded and plain each", min=1)] = 15,
    out: options.Out = None,
    show: options.Show = None,
    as_json: options.Lines = False,
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
        _conclude_profile(show, profile_record.read(show), as_json)
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
        partial(_conclude_profile, as_json=as_json),
        out,
    )
    raise typer.Exit(code)


def _conclude_profile(directory: Path, lines: list[profile_record.Line], as_json: bool) -> bool:
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
