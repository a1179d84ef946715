"""The commands `mutants` and `clean`: judge engines that are wrong on purpose, and right ones on new inputs. Light."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktverify.cli.progress import progress
from ktverify.isolation.interrupt import importing, nothing_written
from ktverify.system.files import reports_dir, write_whole


def mutants(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="only these; default: all")] = None,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
    json: Annotated[
        Path | None, typer.Option(help="where to write the whole table (default for all: reports/mutants.json)")
    ] = None,
) -> None:
    """Judge engines that are wrong in one way each by the default tier's checks. Exit code 1 if one is not found.

    Shows which check kills which mutant, how far over which gate's budget, and which mutants each gate alone kills.

    \b
    Examples:  python -m ktverify mutants
               python -m ktverify mutants lora_scale_one tp_part_lost
    """
    with importing():
        from ktverify.mutants import MUTANTS, kills
        from ktverify.report.console import make_console, print_grid
        from ktverify.report.grid import Grid

    unknown = [name for name in names or [] if name not in MUTANTS]
    if unknown:
        raise ValueError(f"no mutant is called {unknown[0]}; it takes some of {', '.join(MUTANTS)}")
    result = kills.KillTable.of(names or MUTANTS)
    with nothing_written(lambda: kills.so_far(result)):
        with progress("mutants") as say:
            for what in kills.run(result, jobs):
                say(what)
        console = make_console()
        console.print(kills.verdict_line(result))
        if not names:
            console.print(kills.gates_line(result))
        print_grid(
            console, Grid.of(kills.mutant_rows(result), left=("cause", "killed by", "worst gate, times its budget"))
        )
        # of some mutants, only their gates: which gates are needed is a question to all
        gates = [row for row in kills.gate_rows(result) if not names or row["mutants that live without it"]]
        print_grid(console, Grid.of(gates, left=("what exceeds it", "mutants that live without it")))
        console.print(f"{kills.NOT_OF_ENGINES} judges cases, not engines: a test of its own shows what it catches.")
    path = json if json is not None or names else reports_dir() / "mutants.json"
    if path is not None:
        write_whole(path, kills.as_json(result))
    # a few mutants cannot need every gate
    if result.alive or (not names and result.idle_gates):
        raise typer.Exit(1)


def clean(
    runs: Annotated[int, typer.Option(help="how many; each is one engine, instruction set and seed", min=1)] = 200,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
    cases: Annotated[str | None, typer.Option(metavar="GLOB", help="only the small default cases that match")] = None,
    engines: Annotated[str | None, typer.Option(metavar="GLOB", help="only the engines that match")] = None,
    drawn: Annotated[
        int, typer.Option(help="cases a run, drawn as properties draw them, in place of those", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="the first run's seed; later ones are larger", min=0)] = 1000,
) -> None:
    """Judge right engines on new inputs. Exit code 1 if anything fails.

    Right engines: native on each instruction set, the torch engines, and ten that round to bf16 at different points.

    \b
    Examples:  python -m ktverify clean --runs 200
               python -m ktverify clean --engines 'torch_bf16,*_in_bf16' --drawn 100 --runs 20
    """
    with importing():
        from ktverify.mutants import right_engines
        from ktverify.report.console import make_console, print_grid
        from ktverify.report.grid import Grid

    if not right_engines.small_cases(cases):
        known = ", ".join(case.name for case in right_engines.small_cases())
        raise ValueError(f"--cases {cases}: it matches none of the small default cases: {known}")
    if not right_engines.right_engines(engines):
        known = ", ".join(engine.label for engine in right_engines.right_engines())
        raise ValueError(f"--engines {engines}: it matches none of {known}")
    found: list[right_engines.CleanRun] = []

    def so_far() -> str:
        bad = sum(run.bad for run in found)
        return f"{len(found)} of {runs} runs, {bad} with a FAIL" if found else ""

    with nothing_written(so_far):
        with progress("clean", total=runs) as say:
            for more in right_engines.judge_all(runs, jobs, cases, engines=engines, drawn=drawn, first=seed):
                found += more
                # at once: the end may be hours away
                for line in right_engines.failures_of(more):
                    typer.echo(line, err=True)
                say(so_far(), len(found))
        for line in right_engines.verdict_lines(found, cases, drawn):
            typer.echo(line)
        print_grid(make_console(), Grid.of(right_engines.rows_of(found)))
        for line in right_engines.failures_of(found):
            typer.echo(line)
    if any(run.bad for run in found):
        raise typer.Exit(1)
