"""What the commands `verify` and `repro` do with the parts of their work, each in a process that may die.

Comes in: a case, an engine, what to compare. Goes out: records, and the table and verdict that `verify` prints. torch
is imported inside, before any part is started.
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

# the records of a part, and what else there is to say of it
Found = tuple[list["AccuracyRecord"], list[str]]


@dataclass(frozen=True)
class Part:
    """One thing to do: what is shown meanwhile ("" for nothing), and of what its records are if it ends early.

    tensors: none where it judges nothing, but does what was asked for. source, family: as `ktverify.verify.lost` takes
    them.
    """

    run: Callable[[], Found]
    shown: str
    tensors: tuple[str, ...]
    tp: int = 1
    source: str = ""
    family: str = ""


@dataclass(frozen=True)
class Question:
    """What a command asks of an engine. fresh: the live oracle answers, also where there is a golden. time_limit: the
    seconds that one call of the engine may take. forks: each part has a process of its own; see isolation/forked.py."""

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


def judged(question: Question, parts: Sequence[Part]) -> Found:
    """The records of all parts in their order: those of one that took its process down say so.

    RuntimeError where that one judges nothing.
    """
    from ktverify.checks import accuracy as checking
    from ktverify.isolation.forked import Parts

    records: list[AccuracyRecord] = []
    said: list[str] = []
    with closing(Parts([part.run for part in parts], question.time_limit, forks=question.forks)) as supervised:
        for number, part in enumerate(parts):
            try:
                found, more = supervised.value(number, progress(part.shown) if part.shown else nullcontext())
            except EngineDied as ended:
                if not part.tensors:
                    raise RuntimeError(f"{part.shown}: {ended}") from None
                target = replace(question.target, tp=part.tp)
                found, more = (
                    checking.lost(ended, part.tensors, target, question.case, source=part.source, family=part.family),
                    [],
                )
            records += found
            said += more
    return records, said


def parts_of_calls(question: Question, degrees: Sequence[int], mode: str) -> list[Part]:
    """Forward and backward at every TP degree; expected values are computed once, by each process."""
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
    return [Part(partial(run, degree), f"{shown}, TP {degree}", wanted, degree, source) for degree in degrees]


def parts_of_training(question: Question, degrees: Sequence[int], steps: int) -> list[Part]:
    """A training at every TP degree: the worst step's record of each tensor, and what is wrong with the losses."""
    from ktverify.spec import names

    source = "fresh"
    return [
        Part(partial(_trained, question, degree, steps, source), "", names.ALL_TENSORS, degree, source, "training")
        for degree in degrees
    ]


def _trained(question: Question, tp: int, steps: int, source: str) -> Found:
    from ktverify.checks import accuracy as checking
    from ktverify.checks.training_steps import check_training, loss_problem, worst_of_steps
    from ktverify.isolation.calls import ENGINE_EXCEPTIONS, CallLog
    from ktverify.spec import names

    target, case = replace(question.target, tp=tp), question.case
    done: list[list[AccuracyRecord]] = []
    losses: list[float] = []
    training = check_training(target, case, steps=steps)
    try:
        with CallLog() as calls:
            for loss, found in training:
                done.append(found)
                losses.append(loss)
                typer.echo(f"TP {tp}, step {len(done):2d}: loss {loss:.6g}", err=True)
    except ENGINE_EXCEPTIONS as error:
        told = checking.as_told(error, calls.failed)
        return checking.lost(told, names.ALL_TENSORS, target, case, source=source, family="training"), []
    problem = loss_problem(losses)
    return worst_of_steps(done), [f"FAIL training at TP {tp}: {problem}"] if problem else []


def conclude(records: list[AccuracyRecord], problems: list[str]) -> None:
    """Print the table, what failed and the verdict; exit 1 unless something passed, and all that the engine claims."""
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
    """A spinner on a terminal's stderr while something long runs; nothing where the output is kept."""
    from ktverify.report.console import make_console

    return make_console(stderr=True).status(text)
