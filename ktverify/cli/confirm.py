"""The command `confirm`: prints its result, and writes it as confirm.md. Imports heavy modules inside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli.options import ReportsDir, RunName

if TYPE_CHECKING:
    from ktverify.reproducer.confirm import Confirmation
    from ktverify.runs.store import Run

HEADINGS = ("confirmed", "case", "verdict", "tensor", "suite", "script")


def confirm(
    run: RunName = "latest",
    reports: ReportsDir = None,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="for one case", min=1)] = 60.0,
) -> None:
    """Check the claims of a run against its engine again, without the suite.

    Exit code 1 if a claim is refuted; 2 if only scripts that could not be run leave one unconfirmed.

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
        confirmations = repeat(
            found, time_limit=time_limit, done=lambda number, of: bar.update(task, completed=number, total=of)
        )
    text = _text(found, confirmations)
    write_whole(found.directory / FOLDER / "confirm.md", text)
    typer.echo(text, nl=False)
    bad = [each for each in confirmations if not each.confirmed]
    if bad:
        raise typer.Exit(1 if any(each.ran for each in bad) else 2)


def _text(run: Run, confirmations: Sequence[Confirmation]) -> str:
    """Verdict first, then the table, with the unconfirmed claims on top."""
    from ktverify.report.grid import Grid, markdown_table
    from ktverify.reproducer.claims import without_claim
    from ktverify.reproducer.confirm import FOLDER

    assert run.head is not None
    cases = len({each.claim.where for each in confirmations})
    bad = sum(not each.confirmed for each in confirmations)
    broken = sum(not each.ran for each in confirmations)
    left = without_claim(run.records)
    if not confirmations:
        verdict = (
            f"Nothing to confirm: {run.directory.name} says nothing against {run.head.engine} that a case can show."
        )
    elif bad:
        verdict = f"NOT CONFIRMED: {bad} of {len(confirmations)} claims, in {cases} cases of {run.head.engine}."
        if broken:
            verdict += f" Of {broken} of them nothing is known: the engine's script could not be run."
    else:
        verdict = f"CONFIRMED: all {len(confirmations)} claims, in {cases} cases of {run.head.engine}."
    parts = [verdict]
    if confirmations:
        rows = [_row(each) for each in sorted(confirmations, key=_order)]
        parts.append(markdown_table(Grid("", (), HEADINGS, tuple(rows), left=HEADINGS)))
        parts.append(f"To repeat one: the engine's Python, and {os.path.relpath(run.directory)}/{FOLDER}/CASE/run.py")
    if left:
        parts.append(f"Not of one case's forward and backward, and not repeated here: {left} checks.")
    return "\n\n".join(parts) + "\n"


def _order(one: Confirmation) -> tuple[bool, bool]:
    """Unconfirmed claims first, then wrong numbers, then crashes and timeouts."""
    return one.confirmed, one.claim.verdict != "FAIL"


def _row(one: Confirmation) -> tuple[str, ...]:
    word = "yes" if one.confirmed else "NO" if one.ran else "?"
    return (word, str(one.claim.where), one.claim.verdict, one.claim.tensor, one.claim.suite, one.script)
