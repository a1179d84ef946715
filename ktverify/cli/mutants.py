"""What `python -m ktverify mutants` starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ktverify.mutants import MUTANTS
from ktverify.mutants.results import as_json, gate_rows, gates_line, mutant_rows, verdict_line
from ktverify.mutants.runner import NOT_OF_ENGINES, Result, run
from ktverify.report.console import make_console, print_grid
from ktverify.report.grid import Grid
from ktverify.system.files import write_whole


def main(
    names: Annotated[list[str] | None, typer.Argument()] = None,
    jobs: Annotated[int, typer.Option(min=1)] = 2,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Judge mutants by the whole default tier. Exit code 1 where one lives, or, of all, where a gate is idle."""
    unknown = [name for name in names or [] if name not in MUTANTS]
    if unknown:
        typer.echo(f"error: no mutant is called {unknown[0]}; it takes some of {', '.join(MUTANTS)}", err=True)
        raise typer.Exit(2)
    chosen = [MUTANTS[name] for name in names or MUTANTS]
    with Progress(console=make_console(stderr=True)) as progress:
        tasks = {kind: progress.add_task(kind, total=None) for kind in ("checks", "gates")}

        def step(done: int, of: int, what: str) -> None:
            kind = "gates" if " without " in what else "checks"
            progress.update(tasks[kind], total=of, completed=done, description=f"{kind}: {what}"[:60].ljust(60))

        result = run(chosen, jobs, step)
    print_result(result)
    # last: until here Ctrl-C says that nothing was written
    if json_path is not None:
        write_whole(json_path, as_json(result))
    # of a few mutants most gates have nobody to kill
    if result.alive or (not names and result.idle_gates):
        raise typer.Exit(1)


def print_result(result: Result) -> None:
    """Verdict first, then mutants, then gates."""
    console = make_console()
    console.print(verdict_line(result))
    console.print(gates_line(result))
    texts = ("cause", "killed by", "worst gate, times its budget", "what exceeds it", "mutants that live without it")
    for rows in (mutant_rows(result), gate_rows(result)):
        print_grid(console, Grid.of(rows, left=texts))
    console.print(f"{NOT_OF_ENGINES} judges cases, not engines: a test of its own shows what it catches.")
