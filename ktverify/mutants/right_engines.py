"""Right engines on new inputs: a FAIL here would be a false alarm of the checks.

A run is one engine on one instruction set and one seed: forward and backward of all small cases of the default tier, or
`drawn` cases as the properties draw them, each with its property. Emulated AMX runs only tiny ones.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field

import torch

from ktverify.checks import accuracy, isas, property_search
from ktverify.checks.isas import Isa
from ktverify.checks.problem import Problem
from ktverify.checks.properties import PROPERTIES, check_property
from ktverify.checks.registry import PRELOAD
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.isolation.child import ChildPool, workers
from ktverify.judge.gates import Verdict
from ktverify.mutants.roundings import ROUNDING, engine_of
from ktverify.runs.record import NOT_RUN
from ktverify.spec import cases
from ktverify.spec.cases import Case, flops
from ktverify.system.files import suites

_SMALL = 10**9  # floating-point operations of forward and backward
TINY = 10**7  # about a second of emulated AMX
_RIGHT = (registry.NATIVE, "torch_bf16", "torch_grouped_mm")
FIRST_SEED = 1000  # the suites use small seeds

_Ask = Callable[[Target, "CleanRun"], None]


@dataclass(frozen=True)
class RightEngine:
    """A right engine on one instruction set."""

    name: str
    isa: Isa

    @property
    def label(self) -> str:
        return " ".join(filter(None, [self.name.rpartition(":")[2], self.isa.label]))


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


def right_engines(glob: str | None = None) -> list[RightEngine]:
    """Every right engine, of those whose label matches `glob`, on every instruction set that runs here."""
    names = [*_RIGHT, *(engine_of(name) for name in ROUNDING)]
    found = [RightEngine(engine, isa) for engine in names for isa in isas.planned(engine)]
    patterns = [part.strip() for part in (glob or "*").split(",")]
    return [engine for engine in found if any(fnmatch.fnmatchcase(engine.label, pattern) for pattern in patterns)]


def small_cases(glob: str | None = None, limit: int = _SMALL) -> list[Case]:
    """The default cases of at most `limit` floating-point operations whose names match `glob`."""
    return [case for case in cases.select(glob, tier="default") if flops(case, backward=True) <= limit]


def judge(
    seed: int, wanted: list[RightEngine], glob: str | None = None, limit: int = _SMALL, drawn: int = 0
) -> list[CleanRun]:
    """One run per engine; inputs and oracle of a case are computed once for all of them. drawn: how many cases to draw
    in place of those of the catalogue."""
    torch.set_num_threads(1)
    runs = [CleanRun(engine.label, seed) for engine in wanted]
    for case, ask in _drawn(seed, drawn, limit) if drawn else _of_catalogue(seed, glob, limit):
        for engine, run in zip(wanted, runs, strict=True):
            target = Target(engine.name, engine.isa.name, threads=None)
            try:
                ask(target, run)
            except NotImplementedError:
                run.unsupported += 1
            except AssertionError as error:
                run.failed.append(f"{case.id} {error}")
            except Exception as error:
                run.failed.append(f"CRASH {case.id} {type(error).__name__}: {error}")
    return runs


def _of_catalogue(seed: int, glob: str | None, limit: int) -> Iterator[tuple[Case, _Ask]]:
    """The small default cases on the inputs of `seed`, and what counts an engine's tensors into its run."""
    for case in small_cases(glob, limit):
        here = case.with_seed(seed)
        yield here, functools.partial(_judge_tensors, here, Problem.of(here, fresh=True))


def _judge_tensors(case: Case, problem: Problem, target: Target, run: CleanRun) -> None:
    for record in accuracy.check_case(target, case, fresh=True, problem=problem).records:
        if record.verdict in NOT_RUN:
            run.unsupported += 1
            continue
        run.compared += 1
        if record.verdict == Verdict.MISTRUSTED.value:
            run.mistrusted += 1
        elif record.verdict != Verdict.PASS.value:
            run.failed.append(f"{record.message}\n    {record.repro}")


def _drawn(seed: int, count: int, limit: int) -> Iterator[tuple[Case, _Ask]]:
    """`count` cases, drawn for one property after the other, and what counts an engine's comparisons into its run."""
    sizes = property_search.TINY if limit == TINY else property_search.ORDINARY
    each = -(-count // len(PROPERTIES))
    found = [
        (name, case)
        for name, wanted in PROPERTIES.items()
        for case in property_search.drawn(name, wanted, each, seed, sizes)
    ]
    for name, case in found[:count]:
        yield case, functools.partial(_judge_property, name, case)


def _judge_property(name: str, case: Case, target: Target, run: CleanRun) -> None:
    try:
        compared, believed = check_property(target, name, case)
    except AssertionError as error:
        again = f"pytest {suites('properties')} -k {name} --case '{case.id}'{registry.option(target.engine)}"
        raise AssertionError(f"{error}\n    {again}") from error
    run.compared += compared
    run.mistrusted += compared - believed


def judge_all(
    count: int, jobs: int, glob: str | None, *, engines: str | None = None, drawn: int = 0, first: int = FIRST_SEED
) -> Iterator[list[CleanRun]]:
    """`count` runs in `jobs` processes, those of one seed as soon as they are made. first: the first seed."""
    # an emulated engine has tiny cases alone
    tiny = bool(drawn or small_cases(glob, TINY))
    everyone = [engine for engine in right_engines(engines) if tiny or not engine.isa.emulated]
    with workers(jobs) as pool:
        waiting = [
            pool.submit(_one_seed, seed, wanted, glob, drawn) for seed, wanted in _shares(count, everyone, first)
        ]
        for future in as_completed(waiting):
            yield future.result()


def _one_seed(seed: int, wanted: list[RightEngine], glob: str | None, drawn: int) -> list[CleanRun]:
    runs: list[CleanRun] = []
    for engine in wanted:
        if engine.isa.emulated:
            runs += ChildPool(preload=PRELOAD).call_fresh(
                judge, env=engine.isa.env, seed=seed, wanted=[engine], glob=glob, limit=TINY, drawn=drawn
            )
    plain = [engine for engine in wanted if not engine.isa.emulated]
    return runs + (judge(seed, plain, glob, drawn=drawn) if plain else [])


def _shares(count: int, everyone: list[RightEngine], seed: int) -> Iterator[tuple[int, list[RightEngine]]]:
    """(seed, engines), `count` engines in all."""
    while count > 0:
        yield seed, everyone[:count]
        count -= len(everyone)
        seed += 1


def verdict_lines(found: list[CleanRun], glob: str | None, drawn: int = 0) -> list[str]:
    """The verdict, and what a run is."""
    good = sum(not run.bad for run in found)
    verdict = f"{'PASS' if good == len(found) else 'FAIL'} {good} of {len(found)} runs of right engines without a FAIL"
    if drawn:
        return [verdict, f"a run: {drawn} cases that the properties draw from one seed, each with its property"]
    return [
        verdict,
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
