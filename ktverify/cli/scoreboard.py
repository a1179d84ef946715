"""The command `scoreboard`: a page of how engines do, made from runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.system.files import expand, reports_dir

if TYPE_CHECKING:
    from ktverify.report.scoreboard import AnySummary


def scoreboard(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="folders of runs, stamps, or summaries that this command wrote"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the folder of the page (default: scoreboard/)")] = None,
    not_run: Annotated[
        list[str] | None,
        typer.Option(metavar="ENGINE=REASON", help="an engine that cannot be run on this machine, and why"),
    ] = None,
    note: Annotated[
        list[str] | None,
        typer.Option(metavar="ENGINE=NOTE", help="what a reader has to know of the RUN of an engine"),
    ] = None,
    reports: Annotated[Path | None, typer.Option(help="where the runs are (default: reports/)")] = None,
) -> None:
    """Write a page of how engines do, by family and instruction set, from runs of the suites and of the bench.

    OUT gets a summary of each run, a small JSON file, and index.md, which shows all summaries that OUT has: one engine
    after the other can be added. A newer run of an engine on the same processor replaces the older one. Without RUN the
    page is made again.

    \b
    Examples:  python -m ktverify scoreboard latest --out site/
               python -m ktverify scoreboard reports/runs/20250131T0815* --out docs/scoreboard
               python -m ktverify scoreboard --not-run 'kt_kernel=it needs avx512_bf16' --out docs/scoreboard
    """
    from ktverify.report import scoreboard as boards

    found = [_summary(expand(name), reports or reports_dir()) for name in runs or []]
    for engine, text in (_pair("--note", "NOTE", each) for each in note or []):
        if engine not in [summary.engine for summary in found]:
            raise ValueError(f"--note is about {engine!r}, of which no RUN is given")
        found = [_noted(summary, text) if summary.engine == engine else summary for summary in found]
    found += [_absent(*_pair("--not-run", "REASON", each)) for each in not_run or []]
    directory = out if out is not None else Path("scoreboard")
    if not found and not any(directory.glob("*.json")):
        raise ValueError(f"{directory} has no summary of a run, and no RUN is given: name folders of runs")
    shown = boards.write(found, directory)
    typer.echo(f"{directory / boards.PAGE}: {len(shown)} runs")


def _summary(name: str, reports: Path) -> AnySummary:
    """The summary of a run's folder, of a stamp, or in a file."""
    from ktverify.bench import record, scores
    from ktverify.report import scoreboard as boards
    from ktverify.runs import store

    for place in (Path(name), reports / "runs" / name):
        if place.is_file():
            return boards.read(place)
        if (place / record.FILE).is_file():
            return scores.bench_summary(place)
    return boards.SuiteSummary.of(store.load(store.find_run(name, reports)))


def _pair(option: str, what: str, text: str) -> tuple[str, str]:
    """("kt_kernel", "it needs AMX") of "kt_kernel=it needs AMX"."""
    engine, _, said = (part.strip() for part in text.partition("="))
    if not engine or not said:
        raise ValueError(f"{option} is {text!r}; it takes ENGINE={what}")
    return engine, said


def _noted(summary: AnySummary, text: str) -> AnySummary:
    return summary.model_validate({**summary.model_dump(), "note": text})


def _absent(engine: str, reason: str) -> AnySummary:
    import time

    from ktverify.report import scoreboard as boards
    from ktverify.system import machine

    return boards.NotRunSummary(
        engine=engine,
        reason=reason,
        command=f"{boards.COMMAND} --engine {engine}",
        commit=machine.git_commit(),
        at=time.time(),
        machine=boards.ScoredMachine.of(machine.read_machine()),
    )
