"""Right engines on new inputs: a FAIL here would be a false alarm of the checks.

A run is one engine on one instruction set and one seed, forward and backward of all small cases of the default tier.
Emulated AMX runs only the tiny ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field

import torch

from ktverify.checks import accuracy, isas
from ktverify.checks.isas import Isa
from ktverify.checks.problem import Problem
from ktverify.checks.registry import PRELOAD
from ktverify.checks.repro_commands import repro_command
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.isolation.child import ChildPool, workers
from ktverify.judge.gates import Verdict
from ktverify.runs.record import NOT_RUN
from ktverify.spec import cases
from ktverify.spec.cases import Case, flops

_SMALL = 10**9  # floating-point operations of forward and backward
TINY = 10**7  # about a second of emulated AMX
_RIGHT = (registry.NATIVE, "torch_bf16", "torch_grouped_mm")
FIRST_SEED = 1000  # the suites use small seeds


@dataclass(frozen=True)
class RightEngine:
    """A right engine on one instruction set."""

    name: str
    isa: Isa

    @property
    def label(self) -> str:
        return " ".join(filter(None, [self.name, self.isa.label]))


@dataclass
class CleanRun:
    """The counts of one run. failed: the lines of FAIL and CRASH, each with the command that repeats it."""

    label: str
    seed: int
    compared: int = 0
    mistrusted: int = 0
    unsupported: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return bool(self.failed) or not self.compared


def right_engines() -> list[RightEngine]:
    """Every right engine on every instruction set that runs here."""
    return [RightEngine(engine, isa) for engine in _RIGHT for isa in isas.planned(engine)]


def small_cases(glob: str | None = None, limit: int = _SMALL) -> list[Case]:
    """The default cases of at most `limit` floating-point operations whose names match `glob`."""
    return [case for case in cases.select(glob, tier="default") if flops(case, backward=True) <= limit]


def judge(seed: int, wanted: list[RightEngine], glob: str | None = None, limit: int = _SMALL) -> list[CleanRun]:
    """One run per engine; inputs and oracle of a case are computed once for all of them."""
    torch.set_num_threads(1)
    runs = [CleanRun(engine.label, seed) for engine in wanted]
    for case in small_cases(glob, limit):
        here = case.with_seed(seed)
        problem = Problem.of(here, fresh=True)
        for engine, run in zip(wanted, runs, strict=True):
            target = Target(engine.name, engine.isa.name, threads=None)
            command = repro_command(target, here, fresh=True)
            try:
                result = accuracy.check_case(target, here, fresh=True, problem=problem)
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


def judge_all(count: int, jobs: int, glob: str | None, step: Callable[[int], None]) -> list[CleanRun]:
    """`count` runs in `jobs` processes; `step` gets the number of finished runs."""
    found: list[CleanRun] = []
    with workers(jobs) as pool:
        waiting = [pool.submit(_one_seed, seed, wanted, glob) for seed, wanted in _shares(count)]
        for future in as_completed(waiting):
            found += future.result()
            step(len(found))
    return found


def _one_seed(seed: int, wanted: list[RightEngine], glob: str | None) -> list[CleanRun]:
    runs: list[CleanRun] = []
    for engine in wanted:
        if engine.isa.emulated:
            runs += ChildPool(preload=PRELOAD).call_fresh(
                judge, env=engine.isa.env, seed=seed, wanted=[engine], glob=glob, limit=TINY
            )
    plain = [engine for engine in wanted if not engine.isa.emulated]
    return runs + (judge(seed, plain, glob) if plain else [])


def _shares(count: int) -> Iterator[tuple[int, list[RightEngine]]]:
    """(seed, engines), `count` engines in all."""
    everyone, seed = right_engines(), FIRST_SEED
    while count > 0:
        yield seed, everyone[:count]
        count -= len(everyone)
        seed += 1


def verdict_lines(found: list[CleanRun], glob: str | None) -> list[str]:
    """The verdict, and what a run is."""
    good = sum(not run.bad for run in found)
    return [
        f"{'PASS' if good == len(found) else 'FAIL'} {good} of {len(found)} runs of right engines without a FAIL",
        f"a run: forward and backward of the {len(small_cases(glob))} small default cases on one seed's inputs;",
        f"emulated AMX: the {len(small_cases(glob, TINY))} tiny ones",
    ]


def rows_of(found: list[CleanRun]) -> list[dict[str, str]]:
    """A row per engine: its runs, and how many tensors were compared, mistrusted and unsupported."""
    rows = []
    for label in dict.fromkeys(run.label for run in found):
        here = [run for run in found if run.label == label]
        counts = {
            "runs": len(here),
            "tensors": sum(run.compared for run in here),
            "mistrusted": sum(run.mistrusted for run in here),
            "unsupported": sum(run.unsupported for run in here),
        }
        rows.append({"engine": label, **{heading: str(count) for heading, count in counts.items()}})
    return rows


def failures_of(found: list[CleanRun]) -> list[str]:
    """A line, with the command that repeats it, for everything that failed."""
    bad = [run for run in found if run.bad]
    return [f"{run.label}: {line}" for run in bad for line in run.failed or ["nothing was compared"]]
