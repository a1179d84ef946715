"""The command `confirm`: what it prints, and the same as confirm.md. Light: heavy modules are imported inside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ktverify.reproducer.confirm import Finding
    from ktverify.runs.store import Run

HEADINGS = ("confirmed", "case", "verdict", "tensor", "suite", "alone")


def confirm(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="latest, a stamp or its beginning, or a directory")
    ] = "latest",
    reports: Annotated[Path | None, typer.Option(help="where the runs are (default: reports/ of the checkout)")] = None,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="for one case", min=1)] = 60.0,
) -> None:
    """Repeat what a run says against an engine, without the suite.

    Exit code 1 if an accusation is refuted; 2 if only scripts that could not be run leave one unconfirmed.

    Every case that is FAIL, CRASH or TIMEOUT is written as a folder of its inputs, the expected values and the
    engine's own script, and run in the engine's interpreter. The folders stay in the run's directory, below confirm/.

    \b
    Examples:  python -m ktverify confirm
               python -m ktverify confirm 20250131T0815 --time-limit 300
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ktverify.report.console import make_console
    from ktverify.reproducer.confirm import FOLDER
    from ktverify.reproducer.confirm import confirm as repeat
    from ktverify.runs import store
    from ktverify.system.files import write_whole

    found = store.load(store.find_run(run, reports))
    console = make_console(stderr=True)
    columns = (TextColumn("cases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        findings = repeat(
            found, time_limit=time_limit, done=lambda number, of: bar.update(task, completed=number, total=of)
        )
    text = _text(found, findings)
    write_whole(found.directory / FOLDER / "confirm.md", text)
    typer.echo(text, nl=False)
    bad = [finding for finding in findings if not finding.confirmed]
    if bad:
        raise typer.Exit(1 if any(finding.ran for finding in bad) else 2)


def _text(run: Run, findings: Sequence[Finding]) -> str:
    """Verdict first, then the table, what is not confirmed on top."""
    from ktverify.report.grid import Grid, markdown_table
    from ktverify.reproducer.claims import untold
    from ktverify.reproducer.confirm import FOLDER

    assert run.head is not None
    cases = len({finding.accusation.place for finding in findings})
    bad = sum(not finding.confirmed for finding in findings)
    broken = sum(not finding.ran for finding in findings)
    left = untold(run.records)
    if not findings:
        verdict = (
            f"Nothing to confirm: {run.directory.name} says nothing against {run.head.engine} that a case can show."
        )
    elif bad:
        verdict = f"NOT CONFIRMED: {bad} of {len(findings)} accusations, in {cases} cases of {run.head.engine}."
        if broken:
            verdict += f" Of {broken} of them nothing is known: the engine's script could not be run."
    else:
        verdict = f"CONFIRMED: all {len(findings)} accusations, in {cases} cases of {run.head.engine}."
    parts = [verdict]
    if findings:
        rows = [_row(finding) for finding in sorted(findings, key=_order)]
        parts.append(markdown_table(Grid("", (), HEADINGS, tuple(rows), left=HEADINGS)))
        parts.append(f"One again: the engine's Python, and {os.path.relpath(run.directory)}/{FOLDER}/CASE/run.py")
    if left:
        parts.append(f"Not of one case's forward and backward, and not repeated here: {left} checks.")
    return "\n\n".join(parts) + "\n"


def _order(finding: Finding) -> tuple[bool, bool]:
    """What is not confirmed first, then numbers, then what ended the engine."""
    return finding.confirmed, finding.accusation.verdict != "FAIL"


def _row(finding: Finding) -> tuple[str, ...]:
    told = finding.accusation
    word = "yes" if finding.confirmed else "NO" if finding.ran else "?"
    return (word, str(told.place), told.verdict, told.tensor, told.suite, finding.alone)
