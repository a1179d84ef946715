"""Right engines on new inputs: no FAIL may come of it. `python -m ktverify clean` starts this.

A run is one engine on one instruction set and one seed, over all small cases of the default tier: forward and backward,
every tensor by every gate, against the oracle of these inputs. Emulated AMX takes the tiny ones of them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from ktverify import cases, engines, verify
from ktverify.cases import Case, flops
from ktverify.gates import Verdict
from ktverify.report.console import make_console
from suites.meta.mutants.runner import prepare
from suites.support import isas
from suites.support.child import call_fresh
from suites.support.isas import Isa

_SMALL = 10**9  # floating-point operations of forward and backward
_TINY = 10**7  # what a trap handler does in a second
_RIGHT = (engines.NATIVE, "torch_bf16", "torch_grouped_mm")
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
    failed: list[str] = field(default_factory=list)


def subjects() -> list[Subject]:
    """Every right engine there is, on every instruction set that runs here."""
    there = [name for name in _RIGHT if name in engines.names()]
    return [Subject(engine, isa) for engine in there for isa in isas.planned(engine)]


def small_cases(limit: int = _SMALL) -> list[Case]:
    return [case for case in cases.select(tier="default") if flops(case, backward=True) <= limit]


def judge(seed: int, wanted: list[Subject], limit: int = _SMALL) -> list[Run]:
    """One run for each of `wanted`; a case's inputs and oracle are made once for all of them."""
    torch.set_num_threads(1)
    runs = [Run(subject.label, seed) for subject in wanted]
    for case in small_cases(limit):
        here, given = case.with_seed(seed), None
        for subject, run in zip(wanted, runs, strict=True):
            command = verify.repro_command(here, engine=subject.engine, isa=subject.isa.label, fresh=True)
            try:
                given = verify.check_case(subject.engine, here, isa=subject.isa.name, fresh=True, given=given)
            except Exception as error:
                run.failed.append(f"CRASH {here.id} {type(error).__name__}: {error}\n    {command}")
                continue
            for record in given.records:
                run.compared += 1
                if record.verdict == Verdict.MISTRUSTED.value:
                    run.mistrusted += 1
                elif record.verdict != Verdict.PASS.value:
                    run.failed.append(f"{record.message}\n    {record.repro}")
    return runs


def _seed(seed: int, wanted: list[Subject]) -> list[Run]:
    plain = [subject for subject in wanted if not subject.isa.emulated]
    runs = judge(seed, plain) if plain else []
    for subject in wanted:
        if subject.isa.emulated:
            runs += call_fresh("suites.meta.clean:judge", env=subject.isa.env, seed=seed, wanted=[subject], limit=_TINY)
    return runs


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
) -> None:
    """Judge right engines on new inputs."""
    found: list[Run] = []
    with (
        Progress(console=make_console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=prepare) as pool,
    ):
        task = progress.add_task("runs", total=runs)
        for future in as_completed([pool.submit(_seed, seed, wanted) for seed, wanted in _shares(runs)]):
            found += future.result()
            progress.update(task, completed=len(found))
    print_runs(found)
    if any(run.failed for run in found):
        raise typer.Exit(1)


def print_runs(found: list[Run]) -> None:
    """Verdict first, then one line for each engine, then every FAIL."""
    bad = [run for run in found if run.failed]
    word = "FAIL" if bad else "PASS"
    typer.echo(f"{word} {len(found) - len(bad)} of {len(found)} runs of right engines without a FAIL")
    typer.echo(f"a run: forward and backward of the {len(small_cases())} small default cases on one seed's inputs;")
    typer.echo(f"emulated AMX: the {len(small_cases(_TINY))} tiny ones")
    for label in dict.fromkeys(run.label for run in found):
        here = [run for run in found if run.label == label]
        compared, mistrusted = sum(run.compared for run in here), sum(run.mistrusted for run in here)
        typer.echo(f"{label:28} {len(here):4} runs  {compared:7} tensors  {mistrusted:4} mistrusted")
    for run in bad:
        for line in run.failed:
            typer.echo(f"{run.label}: {line}")


if __name__ == "__main__":
    typer.run(main)
