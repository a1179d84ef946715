"""python -m ktverify.golden regenerate: make the goldens anew, or check that they would come out the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktverify.cli.options import PROGRAM, OneLineErrors, with_checked_arguments
from ktverify.cli.progress import progress

app = typer.Typer(cls=OneLineErrors, **PROGRAM)


@app.callback()
def main() -> None:
    """Goldens: the fp64 oracle's answers to every case of the catalogue."""


@app.command()
@with_checked_arguments
def regenerate(
    only: Annotated[str | None, typer.Option(metavar="GLOB", help="only the cases whose name matches")] = None,
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit 1 if anything drifted")] = False,
    force: Annotated[bool, typer.Option("--force", help="write anew even what agrees to 1e-10")] = False,
    full: Annotated[bool, typer.Option("--full", help="also write whole fp64 tensors into .cache/")] = False,
    directory: Annotated[Path | None, typer.Option("--dir", help="the goldens' directory; default golden/")] = None,
) -> None:
    """Compute the fp64 oracle of every case and write golden/; what agrees with its golden to 1e-10 stays as it is."""
    # imported late: --help need not wait for torch
    from ktverify.judge import golden, golden_regenerate

    with progress("goldens", total=1.0) as say:
        result = golden_regenerate.regenerate(
            only, directory=directory, check=check, force=force, full=full, progress=say
        )
    for line in result.lines:
        typer.echo(f"drifted: {line}" if check else line)
    count = f"{len(result.unchanged)} goldens unchanged, {len(result.written)} {'drifted' if check else 'written'}"
    typer.echo(f"{count} in {directory or golden.golden_dir()}")
    if check and result.lines:
        raise typer.Exit(1)
