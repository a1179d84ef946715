"""The work of `verify` and `repro`: steps that call an engine, each in a process that may die.

Light: torch is imported inside the functions, before the first step is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from ktverify.errors import EngineDied

if TYPE_CHECKING:
    from ktverify.checks.problem import Problem
    from ktverify.checks.target import Target
    from ktverify.runs.record import AccuracyRecord
    from ktverify.spec.cases import Case

MODES = ("forward", "backward", "training", "all")
TP_CHOICES = ("no-tp", "tp", "all")
DEFAULT_CASE = "qwen3_30b_a3b_e8"
_TRAINING_SOURCE = "fresh"  # no golden knows the parameters after a step

# the records of a step, and further lines to print
Found = tuple[list["AccuracyRecord"], list[str]]


@dataclass(frozen=True)
class Step:
    """One step: `run`, the text shown meanwhile ("" for none), and what its records are about if its process dies.

    tensors: () for a step that judges nothing, such as writing a file. tp, source, family: as in `accuracy.lost`.
    """

    run: Callable[[], Found]
    shown: str
    tensors: tuple[str, ...]
    tp: int = 1
    source: str = ""
    family: str = ""


@dataclass(frozen=True)
class Question:
    """What a command asks of an engine. fresh: compare with the live oracle, not with a golden. time_limit: seconds for
    one call of the engine. forks: each step has a process of its own; see isolation/forked.py."""

    target: Target
    case: Case
    fresh: bool
    time_limit: float
    forks: bool


def tp_degrees(case: Case, choice: str) -> tuple[int, ...]:
    """The tensor parallel degrees of `no-tp`, `tp` or `all` for a case. ValueError for another word, or for none."""
    if choice not in TP_CHOICES:
        raise ValueError(f"--tp is {choice!r}, it takes one of {', '.join(TP_CHOICES)}")
    if choice == "no-tp":
        return (1,)
    degrees = tuple(degree for degree in case.tp if degree > 1 or choice == "all")
    if not degrees:
        raise ValueError(f"{case.id} has no TP degree above 1: I = {case.intermediate}")
    return degrees


def run_steps(question: Question, steps: Sequence[Step]) -> Found:
    """The records and lines of all steps, in order; a step whose process died gives records that say so.

    RuntimeError where such a step judges nothing.
    """
    from ktverify.checks import accuracy as checking
    from ktverify.isolation.forked import Parts

    records: list[AccuracyRecord] = []
    lines: list[str] = []
    with closing(Parts([step.run for step in steps], question.time_limit, forks=question.forks)) as supervised:
        for number, step in enumerate(steps):
            more: list[str] = []
            try:
                found, more = supervised.value(number, progress(step.shown) if step.shown else nullcontext())
            except EngineDied as died:
                if not step.tensors:
                    raise RuntimeError(f"{step.shown}: {died}") from None
                target = replace(question.target, tp=step.tp)
                found = checking.lost(died, step.tensors, target, question.case, source=step.source, family=step.family)
            records += found
            lines += more
    return records, lines


def call_steps(question: Question, degrees: Sequence[int], mode: str) -> list[Step]:
    """Forward and backward at every TP degree; each process computes the expected values once."""
    from ktverify.checks import accuracy as checking
    from ktverify.checks.problem import source_of
    from ktverify.diagnose.hook import add_cause
    from ktverify.engines.run import METHOD
    from ktverify.spec import names

    wanted = {"forward": (names.OUTPUT,), "backward": names.BACKWARD_TENSORS}.get(mode, names.ALL_TENSORS)
    case, method = question.case, question.target.method
    kept: list[Problem] = []

    def run(degree: int) -> Found:
        target = replace(question.target, tp=degree)
        result = checking.check_case(
            target,
            case,
            fresh=question.fresh,
            backward=mode != "forward",
            tensors=wanted,
            problem=kept[0] if kept else None,
        )
        if method == METHOD:
            add_cause(result, target)
        kept[:] = [result.problem]
        return result.records, []

    shown = mode if mode != "all" else "forward and backward"
    source = source_of(case, fresh=question.fresh, method=method)
    return [Step(partial(run, degree), f"{shown}, TP {degree}", wanted, degree, source) for degree in degrees]


def training_steps(question: Question, degrees: Sequence[int], count: int) -> list[Step]:
    """A training of `count` optimizer steps at every TP degree: the worst record of each tensor, and loss problems."""
    from ktverify.spec import names

    return [
        Step(partial(_train, question, degree, count), "", names.ALL_TENSORS, degree, _TRAINING_SOURCE, "training")
        for degree in degrees
    ]


def _train(question: Question, tp: int, count: int) -> Found:
    from ktverify.checks import accuracy as checking
    from ktverify.checks.training_steps import check_training, loss_problem, worst_of_steps
    from ktverify.isolation.calls import ENGINE_EXCEPTIONS, CallLog
    from ktverify.spec import names

    target, case = replace(question.target, tp=tp), question.case
    done: list[list[AccuracyRecord]] = []
    losses: list[float] = []
    training = check_training(target, case, steps=count)
    try:
        with CallLog() as calls:
            for loss, found in training:
                done.append(found)
                losses.append(loss)
                typer.echo(f"TP {tp}, step {len(done):2d}: loss {loss:.6g}", err=True)
    except ENGINE_EXCEPTIONS as error:
        failure = checking.crash_or_raise(error, calls.failed)
        return checking.lost(failure, names.ALL_TENSORS, target, case, source=_TRAINING_SOURCE, family="training"), []
    problem = loss_problem(losses)
    return worst_of_steps(done), [f"FAIL training at TP {tp}: {problem}"] if problem else []


def conclude(records: list[AccuracyRecord], problems: list[str]) -> None:
    """Print the table, the failures and the verdict; exit 1 unless something passed and nothing failed."""
    from ktverify.checks.causes import cause_of
    from ktverify.report import console
    from ktverify.report.problems import problem_text

    claimed = [record for record in records if record.verdict != "UNSUPPORTED"]
    if claimed:
        console.print_accuracy(claimed)
    declared = [record for record in records if record.verdict == "UNSUPPORTED"]
    for tp, training, message in dict.fromkeys((r.tp, r.family == "training", r.message) for r in declared):
        typer.echo(f"TP {tp}{', training' if training else ''}: {message}")
    bad = [record for record in claimed if record.verdict != "PASS"]
    for text, cause in dict.fromkeys((problem_text(record), cause_of(record.message)) for record in bad):
        typer.echo(text)
        if cause:
            typer.echo(f"    {cause}")
    for problem in problems:
        typer.echo(problem)
    beside = f"; {len(declared)} are UNSUPPORTED" if declared else ""
    if bad or problems:
        more = f", and {len(problems)} more" if problems else ""
        typer.echo(f"FAIL {len(bad)} of {len(claimed)} comparisons{more}{beside}")
        raise typer.Exit(1)
    if not claimed:
        typer.echo(f"FAIL nothing was compared{beside}")
        raise typer.Exit(1)
    typer.echo(f"PASS {len(claimed)} comparisons{beside}")


def progress(text: str) -> Any:
    """A spinner on stderr while a long step runs; nothing where stderr is not a terminal."""
    from ktverify.report.console import make_console

    return make_console(stderr=True).status(text)
