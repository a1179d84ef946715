"""Right engines on new inputs: no FAIL may come of it. `python -m ktverify clean` starts this.

A run is one engine on one instruction set and one seed, over all small cases of the default tier: forward and backward,
every tensor by every gate, against the oracle of these inputs. Emulated AMX takes the tiny ones of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from ktverify.checks import accuracy, isas
from ktverify.checks.isas import Isa
from ktverify.checks.problem import Problem
from ktverify.checks.registry import PRELOAD
from ktverify.checks.repro_commands import repro_command
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.isolation.child import ChildPool
from ktverify.isolation.pool import workers
from ktverify.judge.gates import Verdict
from ktverify.report.console import make_console, print_grid
from ktverify.report.grid import Grid
from ktverify.runs.record import NOT_RUN
from ktverify.spec import cases
from ktverify.spec.cases import Case, flops

_SMALL = 10**9  # floating-point operations of forward and backward
_TINY = 10**7  # what a trap handler does in a second
_RIGHT = (registry.NATIVE, "torch_bf16", "torch_grouped_mm")
FIRST_SEED = 1000  # far from those of the suites


@dataclass(frozen=True)
class Subject:
    """A right engine on one instruction set."""

    engine: str
    isa: Isa

    @property
    def label(self) -> str:
        return " ".join(filter(None, [self.engine, self.isa.label]))


@dataclass
class Run:
    """What one run found. failed: the lines of FAIL and CRASH, each with the command that repeats it."""

    label: str
    seed: int
    compared: int = 0
    mistrusted: int = 0
    unsupported: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return bool(self.failed) or not self.compared


def subjects() -> list[Subject]:
    """Every right engine there is, on every instruction set that runs here."""
    there = [name for name in _RIGHT if name in registry.names()]
    return [Subject(engine, isa) for engine in there for isa in isas.planned(engine)]


def small_cases(glob: str | None = None, limit: int = _SMALL) -> list[Case]:
    return [case for case in cases.select(glob, tier="default") if flops(case, backward=True) <= limit]


def judge(seed: int, wanted: list[Subject], glob: str | None = None, limit: int = _SMALL) -> list[Run]:
    """One run for each of `wanted`; a case's inputs and oracle are made once for all of them."""
    torch.set_num_threads(1)
    runs = [Run(subject.label, seed) for subject in wanted]
    for case in small_cases(glob, limit):
        here = case.with_seed(seed)
        problem = Problem.of(here, fresh=True)
        for subject, run in zip(wanted, runs, strict=True):
            command = repro_command(here, engine=subject.engine, isa=subject.isa.label, fresh=True)
            try:
                result = accuracy.check_case(
                    Target(subject.engine, subject.isa.name, threads=None), here, fresh=True, problem=problem
                )
            except Exception as error:
                run.failed.append(f"CRASH {here.id} {type(error).__name__}: {error}\n    {command}")
                continue
            for record in result.records:
                if record.verdict in NOT_RUN:
                    run.unsupported += 1
                    continue
                run.compared += 1
                if record.verdict == Verdict.MISTRUSTED.value:
                    run.mistrusted += 1
                elif record.verdict != Verdict.PASS.value:
                    run.failed.append(f"{record.message}\n    {record.repro}")
    return runs


def _seed(seed: int, wanted: list[Subject], glob: str | None) -> list[Run]:
    runs: list[Run] = []
    for subject in wanted:
        if subject.isa.emulated:
            runs += ChildPool(preload=PRELOAD).call_fresh(
                judge, env=subject.isa.env, seed=seed, wanted=[subject], glob=glob, limit=_TINY
            )
    plain = [subject for subject in wanted if not subject.isa.emulated]
    return runs + (judge(seed, plain, glob) if plain else [])


def _shares(count: int) -> Iterator[tuple[int, list[Subject]]]:
    """(seed, engines) until `count` runs are given out."""
    everyone, seed = subjects(), FIRST_SEED
    while count > 0:
        yield seed, everyone[:count]
        count -= len(everyone)
        seed += 1


def main(
    runs: Annotated[int, typer.Option(min=1)] = 200,
    jobs: Annotated[int, typer.Option(min=1)] = 2,
    cases: Annotated[str | None, typer.Option(metavar="GLOB")] = None,
) -> None:
    """Judge right engines on new inputs."""
    if not small_cases(cases, _TINY):
        typer.echo(f"error: --cases {cases}: it matches none of the tiny default cases", err=True)
        raise typer.Exit(2)
    found: list[Run] = []
    with (
        Progress(console=make_console(stderr=True)) as progress,
        workers(jobs) as pool,
    ):
        task = progress.add_task("runs", total=runs)
        waiting = [pool.submit(_seed, seed, wanted, cases) for seed, wanted in _shares(runs)]
        for future in as_completed(waiting):
            found += future.result()
            progress.update(task, completed=len(found))
    print_runs(found, cases)
    if any(run.bad for run in found):
        raise typer.Exit(1)


def print_runs(found: list[Run], glob: str | None) -> None:
    """Verdict first, then one line for each engine, then every FAIL."""
    bad = [run for run in found if run.bad]
    word = "FAIL" if bad else "PASS"
    typer.echo(f"{word} {len(found) - len(bad)} of {len(found)} runs of right engines without a FAIL")
    typer.echo(f"a run: forward and backward of the {len(small_cases(glob))} small default cases on one seed's inputs;")
    typer.echo(f"emulated AMX: the {len(small_cases(glob, _TINY))} tiny ones")
    rows = []
    for label in dict.fromkeys(run.label for run in found):
        here = [run for run in found if run.label == label]
        counts = [sum(getattr(run, what) for run in here) for what in ("compared", "mistrusted", "unsupported")]
        rows.append((label, *map(str, (len(here), *counts))))
    headings = ("engine", "runs", "tensors", "mistrusted", "unsupported")
    print_grid(make_console(), Grid("", (), headings, tuple(rows)))
    for run in bad:
        for line in run.failed or ["nothing was compared"]:
            typer.echo(f"{run.label}: {line}")
