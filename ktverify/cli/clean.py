"""The command `clean`: judge right engines on new inputs.

Heavy modules are imported inside the command.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ktverify.isolation.interrupt import importing, nothing_written


def clean(
    runs: Annotated[int, typer.Option(help="how many; each is one engine, instruction set and seed", min=1)] = 200,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
    cases: Annotated[str | None, typer.Option(metavar="GLOB", help="only the small default cases that match")] = None,
) -> None:
    """Judge right engines on new inputs. Exit code 1 if anything fails.

    \b
    Example:  python -m ktverify clean --runs 200
    """
    with importing():
        from rich.progress import Progress

        from ktverify.mutants import right_engines
        from ktverify.report.console import make_console, print_grid
        from ktverify.report.grid import Grid

    if not right_engines.small_cases(cases, right_engines.TINY):
        raise ValueError(f"--cases {cases}: it matches none of the tiny default cases")
    with nothing_written():
        with Progress(console=make_console(stderr=True)) as progress:
            task = progress.add_task("runs", total=runs)
            found = right_engines.judge_all(runs, jobs, cases, lambda done: progress.update(task, completed=done))
        for line in right_engines.verdict_lines(found, cases):
            typer.echo(line)
        print_grid(make_console(), Grid.of(right_engines.rows_of(found)))
        for line in right_engines.failures_of(found):
            typer.echo(line)
    if any(run.bad for run in found):
        raise typer.Exit(1)
