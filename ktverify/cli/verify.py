"""The commands `verify` and `repro`: steps that call an engine, each in a process that may die.

Light: torch is imported inside the functions, before the first step is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli import options
from ktverify.cli.options import check_choice
from ktverify.cli.progress import progress
from ktverify.errors import EngineDied
from ktverify.spec.cases import Case

if TYPE_CHECKING:
    from ktverify.checks.problem import Problem
    from ktverify.checks.target import Target
    from ktverify.runs.record import AccuracyRecord

MODES = ("forward", "backward", "training", "all")
TP_CHOICES = ("no-tp", "tp", "all")
DEFAULT_CASE = "qwen3_30b_a3b_e8"
_TRAINING_SOURCE = "fresh"  # no golden knows the parameters after a step

# the records of a step, and further lines to print
Found = tuple[list["AccuracyRecord"], list[str]]


def verify(
    context: typer.Context,
    mode: Annotated[str, typer.Option(help="forward, backward, training or all")] = "all",
    method: options.Method = "AMXBF16_SFT",
    tp: Annotated[str, typer.Option(help="no-tp, tp (every degree above 1 that the case has) or all")] = "no-tp",
    case: Annotated[str | None, typer.Option(help="a case as repro takes it (default: a Qwen3-30B-A3B shape)")] = None,
    engine: options.EngineName = "native",
    isa: options.Isa = None,
    threads: options.Threads = None,
    fresh: Annotated[int | None, typer.Option(metavar="SEED", help="draw new inputs from this seed")] = None,
    steps: Annotated[int, typer.Option(help="training steps", min=2)] = 10,
    time_limit: options.TimeLimit = 900,
) -> None:
    """Verify one engine without pytest: inputs, oracle, gates, one table.

    forward compares the output, backward every gradient; training takes optimizer steps (AdamW) and compares every
    step with the oracle on the same parameters, and the loss must fall.

    \b
    Examples:  python -m ktverify verify
               python -m ktverify verify --mode forward --method AMXBF16_SFT --tp no-tp
               python -m ktverify verify --mode all --tp all --case deepseek_v3_t4
               python -m ktverify verify --mode training --engine my_package.layer:make_layer
    """
    # parsed first: a wrong name is refused before torch is imported
    check_choice("--mode", mode, MODES)
    parsed = Case.parse(case or DEFAULT_CASE)
    from ktverify.checks.accuracy import METHODS
    from ktverify.checks.target import Target
    from ktverify.engines.run import METHOD

    check_choice("--method", method, METHODS)
    if fresh is not None:
        parsed = parsed.with_seed(fresh)
    degrees = tp_degrees(parsed, tp)
    if mode == "training" and method != METHOD:
        raise ValueError(f"--mode training steps the LoRA parameters, which {method} has no gradients for")
    target = Target(engine, isa, threads=threads, method=method)
    question = Question(target, parsed, fresh is not None, time_limit, isinstance(context.obj, options.OwnProgram))
    typer.echo(f"{parsed.id}: {parsed.why}")
    todo = call_steps(question, degrees, mode) if mode != "training" else []
    if mode in ("training", "all") and method == METHOD:
        todo += training_steps(question, degrees, steps)
    conclude(*run_steps(question, todo))


def repro(
    context: typer.Context,
    case: options.CaseText,
    engine: options.EngineName = "native",
    isa: options.Isa = None,
    tensor: options.Tensors = None,
    tp: options.Tp = 1,
    threads: options.Threads = None,
    method: options.Method = "AMXBF16_SFT",
    fresh: Annotated[bool, typer.Option("--fresh", help="compare with the live oracle, not with the golden")] = False,
    dump: Annotated[Path | None, typer.Option(help="save inputs, actual and expected as safetensors")] = None,
    stand_alone: Annotated[
        Path | None,
        typer.Option("--stand-alone", metavar="DIR", help="write a folder that repeats it without ktverify"),
    ] = None,
    time_limit: options.TimeLimit = 900,
) -> None:
    """Run one case and say for every tensor what its gates said.

    CASE is printed by every failing check, so its command line can be pasted. A changed or hand-written case, or
    another seed, is compared with the oracle, computed live.

    \b
    Examples:  python -m ktverify repro small
               python -m ktverify repro 'small,T=1@seed=3' --isa scalar --tensor grad_up_lora_a
               python -m ktverify repro 'E=8,k=2,H=64,I=96,T=33,r=4' --engine torch_bf16
               python -m ktverify repro small --fresh --dump small.safetensors
               python -m ktverify repro small --engine kt_kernel --stand-alone small
    """
    # parsed first: a wrong name is refused before torch is imported
    parsed = Case.parse(case)
    from ktverify.checks import accuracy as checking
    from ktverify.checks.problem import Problem, Result, source_of
    from ktverify.checks.target import Target
    from ktverify.diagnose.hook import add_cause
    from ktverify.engines.run import METHOD
    from ktverify.reproducer import bundle

    wanted = checking.check_names(tensor, backward=True)
    kept: list[Result] = []
    target = Target(engine, isa, tp, threads, method)

    def script() -> Found:
        bundle.script_of(engine)
        return [], []

    def run() -> Found:
        result = checking.check_case(target, parsed, fresh=fresh, backward=tensor != ["output"], tensors=tensor)
        if method == METHOD:
            add_cause(result, target)
        kept.append(result)
        return result.records, []

    def write() -> Found:
        # in a new process where the engine has ended the first
        result = kept[0] if kept else Result(Problem.of(parsed, fresh=fresh, method=method))
        written = []
        if dump is not None:
            written.append(f"{bundle.dump(result, dump)} tensors in {dump}")
        if stand_alone is not None:
            script = bundle.write_result(result, target, stand_alone)
            written.append(f"{script}: run it with a Python that has {engine}")
        return [], written

    question = Question(target, parsed, fresh, time_limit, isinstance(context.obj, options.OwnProgram))
    source = source_of(parsed, fresh=fresh, method=method)
    todo = [Step(run, f"{parsed.id} on {engine}", wanted, tp, source)]
    if stand_alone is not None:
        # first, because nothing need be computed where the engine has no script
        todo.insert(0, Step(script, f"the stand-alone script of {engine}", ()))
    if dump is not None or stand_alone is not None:
        todo.append(Step(write, "writing", ()))
    records, written = run_steps(question, todo)
    typer.echo(f"{parsed.id}: {parsed.why}")
    parts = [f"engine {engine}", f"ISA {records[0].isa or 'its own choice'}", f"TP {tp}"]
    if any(record.gates for record in records):
        parts.append("compared with " + ("the golden" if records[0].source == "golden" else "the live oracle"))
    typer.echo(", ".join(parts))
    lines = [record.message + ("" if record.verdict == "PASS" else f"\n    {record.repro}") for record in records]
    # dict.fromkeys: one crash is the message of several tensors, and is printed once
    for line in (*dict.fromkeys(lines), *written):
        typer.echo(line)
    if any(record.verdict != "PASS" for record in records):
        raise typer.Exit(1)


# ---- steps


@dataclass(frozen=True)
class Step:
    """One step: `run`, the text shown meanwhile, and what its records are about if its process dies.

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
                found, more = supervised.value(number, progress(step.shown, lines=step.family == "training"))
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
        Step(
            partial(_train, question, degree, count),
            f"training, TP {degree}",
            names.ALL_TENSORS,
            degree,
            _TRAINING_SOURCE,
            "training",
        )
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
