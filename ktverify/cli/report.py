"""The command `report`."""

from __future__ import annotations

from typing import Annotated

import typer

from ktverify.cli.options import ReportsDir, RunName


def report(
    run: RunName = "latest",
    reports: ReportsDir = None,
    write: Annotated[
        bool, typer.Option("--write", help="write the run's pages again, also those of a killed run")
    ] = False,
) -> None:
    """Print a run: verdict, machine, what did not pass, times.

    The default is the newest run.

    \b
    Examples:  python -m ktverify report
               python -m ktverify report 20250131T0815
               python -m ktverify report path/to/run --write
    """
    from ktverify.report import console
    from ktverify.report.pages import write_run
    from ktverify.runs import store

    found = store.load(store.find_run(run, reports))
    if write:
        write_run(found)
    if not console.print_run(found):
        raise typer.Exit(1)
