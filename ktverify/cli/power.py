"""The commands `mutants` and `clean`: what the suite finds, and that it invents nothing. Both run in a checkout.

The suites do the work: see checkout.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktverify.cli.checkout import become
from ktverify.system.paths import ROOT


def mutants(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="only these; default: all")] = None,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
    json: Annotated[
        Path | None, typer.Option(help="where to write the whole table (default for all: reports/mutants.json)")
    ] = None,
) -> None:
    """Judge engines that are wrong in one way each by the default tier's checks. Exit code 1 if one lives.

    Says which check kills which, how far over which gate's budget, and which mutants each gate alone kills.

    \b
    Examples:  python -m ktverify mutants
               python -m ktverify mutants lora_scale_one tp_part_lost
    """
    target = json if json is not None or names else ROOT / "reports" / "mutants.json"
    arguments = [*(names or []), "--jobs", str(jobs), *(["--json", str(target.resolve())] if target else [])]
    become("ktverify.cli.mutants", arguments)


def clean(
    runs: Annotated[int, typer.Option(help="how many; each is one engine, instruction set and seed", min=1)] = 200,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
    cases: Annotated[str | None, typer.Option(metavar="GLOB", help="only the small default cases that match")] = None,
) -> None:
    """Judge right engines on new inputs. Exit code 1 if anything fails.

    \b
    Example:  python -m ktverify clean --runs 200
    """
    chosen = ["--cases", cases] if cases is not None else []
    become("ktverify.cli.clean", ["--runs", str(runs), "--jobs", str(jobs), *chosen])
