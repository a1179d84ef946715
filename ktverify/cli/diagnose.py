"""The commands `diagnose` and `debug`.

Heavy modules are imported inside the commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktverify.cli.options import (
    CallMemoryLimit,
    CallTimeLimit,
    CaseOrMutants,
    CaseText,
    EngineName,
    Isa,
    Tensors,
    Tp,
    print_verdict,
)
from ktverify.cli.progress import progress
from ktverify.isolation.interrupt import importing, nothing_written

if TYPE_CHECKING:
    from ktverify.diagnose.asking import Asking
    from ktverify.diagnose.evidence import Explanation
    from ktverify.diagnose.search import Diagnosis

# checks that a line names before it counts the rest
_NAMED = 6


def diagnose(
    case: CaseOrMutants = None,
    engine: EngineName = "native",
    isa: Isa = None,
    tp: Tp = 1,
    tensor: Tensors = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
    mutants: Annotated[bool, typer.Option("--mutants", help="diagnose the engines that are wrong on purpose")] = False,
    seconds: Annotated[float, typer.Option(help="after this time no further check is begun", min=0)] = 120,
    time_limit: CallTimeLimit = None,
    memory_limit: CallMemoryLimit = None,
) -> None:
    """Find what is wrong with an engine, and why.

    Hypotheses are tested on the tensors of the case and ranked by how much of the error each explains. Then it is asked
    which values go stale, and the checks of the contract are run. All findings are listed, the most telling first. An
    engine that dies, hangs or takes too much memory ends only its own call.

    \b
    Examples:  python -m ktverify diagnose small --engine my_package.layer:make_layer
               python -m ktverify diagnose 'small,T=1' --tensor grad_up_lora_a --json
               python -m ktverify diagnose --mutants lora_scale_one

    Exit code 0: nothing to explain; 1: there is something wrong, or nothing could be computed.
    """
    given = case or []
    if mutants:
        _diagnose_mutants(given)
        return
    if len(given) > 1:
        raise ValueError(f"CASE takes one case, got {len(given)}")
    from ktverify.checks.accuracy import check_names
    from ktverify.checks.target import Target
    from ktverify.diagnose.diagnose import diagnose as search
    from ktverify.spec.cases import Case

    parsed = Case.parse(given[0] if given else "small")
    target = Target(engine, isa, tp, threads=None)
    wanted = check_names(tensor, True)
    with progress(f"{parsed.id} on {engine}") as say, _asking(time_limit, memory_limit) as asking:
        found = search(parsed, target, tensors=wanted, seconds=seconds, asking=asking, say=say)
    if as_json:
        typer.echo(_as_json(found, engine))
    else:
        _print(found, engine, tp)
    nothing = bool(found.unsupported) and found.computed == 0
    if found.failing or found.explanations or nothing:
        raise typer.Exit(1)


def _asking(time_limit: float | None, memory_limit: float | None) -> Asking:
    from ktverify.diagnose.asking import Asking
    from ktverify.isolation.child import BIG, DEFAULT

    return Asking(DEFAULT.but(time_limit, memory_limit), BIG.but(time_limit, memory_limit))


def _print(found: Diagnosis, engine: str, tp: int) -> None:
    typer.echo(found.line)
    where = f"{found.case.id}, engine {engine}, TP {tp}"
    if found.failing:
        wrong = f"over budget: {', '.join(found.failing)}"
    else:
        wrong = "every tensor is within its budget" if found.complete else "no tensor that it gave is over budget"
    kind = f"; kind of cause: {found.first.cause.value}" if found.first is not None else ""
    typer.echo(f"{where}: {wrong}; {found.tried} tried{kind}")
    if found.note:
        typer.echo(found.note)
    if found.unexplained and found.first is not None:
        typer.echo(f"no hypothesis fits what is left of {', '.join(found.unexplained)}")
    for number, each in enumerate(found.explanations, start=1):
        if number > 1:
            typer.echo(f"{number}. {each.cause.value}: {each.line}")
        for line in _evidence(each):
            typer.echo(f"    {line}")
    if found.alternatives:
        typer.echo("less likely:")
    for each in found.alternatives[:3]:
        typer.echo(f"    {each.cause.value}: {each.line}")
    for reason, places in found.unsupported.items():
        typer.echo(f"UNSUPPORTED {reason} ({_few(places)})")


def _evidence(each: Explanation) -> list[str]:
    """How sure a finding is, what belongs to it, and which checks show it as well."""
    lines = list(each.details)
    lines.append(f"{each.level}: {each.proof}" if each.proof else each.level)
    return [*lines, *([f"shown also by {_few(each.also)}"] if each.also else [])]


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def _as_json(found: Diagnosis, engine: str) -> str:
    import json

    findings = [
        {
            "cause": each.cause.value,
            "text": each.text,
            "explains": each.share,
            "complete": each.complete,
            "level": each.level,
            "proof": each.proof,
            "tensors": list(each.tensors),
            "evidence": list(each.details),
            "shown_also_by": list(each.also),
        }
        for each in (*found.explanations, *found.alternatives)
    ]
    for entry in findings[len(found.explanations) :]:
        entry["level"] = "possible"
    document = {
        "case": found.case.id,
        "engine": engine,
        "failing": list(found.failing),
        "unexplained": list(found.unexplained),
        "unsupported": found.unsupported,
        "tried": found.tried,
        "note": found.note,
        "findings": findings,
    }
    return json.dumps(document, indent=2)


def _diagnose_mutants(names: list[str]) -> None:
    """Print the first-ranked cause of every mutant, or of those named. Exit code 1 where fewer than LEAST are right."""
    with importing():
        from ktverify.mutants import MUTANTS
        from ktverify.mutants.diagnosed import LEAST, diagnosed

    unknown = [name for name in names if name not in MUTANTS]
    if unknown:
        raise ValueError(f"no mutant is called {unknown[0]}; it takes some of {', '.join(MUTANTS)}")
    chosen = [MUTANTS[name] for name in names or MUTANTS]
    with nothing_written():
        results = []
        for number, result in enumerate(diagnosed(chosen), start=1):
            typer.echo(f"{number}/{len(chosen)} {result.mutant.name}", err=True)
            typer.echo(result.line)
            results.append(result)
    right = sum(result.right for result in results)
    share = f"{right} of {len(results)} first-ranked causes are right ({100 * right / len(results):.0f} %)"
    print_verdict(right >= LEAST * len(results), f"{share}, at least {100 * LEAST:.0f} % must be")


# ---- debug


def debug_nan(
    case: CaseText,
    engine: EngineName = "native",
    isa: Isa = None,
    tp: Tp = 1,
    save: Annotated[Path, typer.Option(help="where to write the tensors")] = Path(".cache/nan.safetensors"),
    time_limit: CallTimeLimit = None,
    memory_limit: CallMemoryLimit = None,
) -> None:
    """Find the first NaN or Inf: stage, expert, token, index; save the tensors to replay it.

    Searches the oracle's stages on the case's inputs (x, gate and up, their LoRA parts, silu, h, down, the weighted
    sum, then those of the backward), and the engine's tensors. Exit code 1 where there is a NaN or Inf.

    \b
    Example:  python -m ktverify debug nan nan_row --engine my_package.layer:make_layer
    """
    from ktverify.checks.target import Target
    from ktverify.diagnose import debug
    from ktverify.spec.cases import Case

    parsed, target = Case.parse(case), Target(engine, isa, tp, threads=None)
    with progress(f"{parsed.id} on {engine}"), _asking(time_limit, memory_limit) as asking:
        given = asking.compute(target, parsed)
    found = debug.walk_non_finite(parsed, given, target, save)
    for line in found:
        typer.echo(line)
    if found[0] != debug.FINITE:
        raise typer.Exit(1)


def debug_gradients(
    case: CaseText,
    engine: EngineName = "native",
    isa: Isa = None,
    tp: Tp = 1,
    time_limit: CallTimeLimit = None,
    memory_limit: CallMemoryLimit = None,
) -> None:
    """Print differences, norms, cosine and the worst index of each tensor. Exit code 1 where one is missing.

    \b
    Example:  python -m ktverify debug gradients small --engine my_package.layer:make_layer
    """
    from ktverify.checks.target import Target
    from ktverify.diagnose.debug import fault_lines, gradient_rows
    from ktverify.report.console import make_console, print_grid
    from ktverify.report.grid import Grid
    from ktverify.spec.cases import Case

    parsed = Case.parse(case)
    with progress(f"{parsed.id} on {engine}"), _asking(time_limit, memory_limit) as asking:
        given = asking.compute(Target(engine, isa, tp, threads=None), parsed)
    for line in fault_lines(given):
        typer.echo(line)
    note, rows = gradient_rows(parsed, given)
    if rows:
        print_grid(make_console(), Grid.of(rows, note, left=("worst",)))
    if given.fault is not None:
        raise typer.Exit(1)


def debug_tp(
    intermediate_size: Annotated[int, typer.Option(help="moe_intermediate_size", min=1)],
    threadpool_count: Tp,
) -> None:
    """Report whether a TP degree divides an intermediate size, and which sizes it divides.

    \b
    Example:  python -m ktverify debug tp --intermediate-size 2049 --threadpool-count 4
    """
    from ktverify.engines import argument_checks

    try:
        argument_checks.check_tp(intermediate_size, threadpool_count)
    except RuntimeError as error:
        typer.echo(f"no: {error}")
        above = -(-intermediate_size // threadpool_count) * threadpool_count
        below = above - threadpool_count
        sizes = " or ".join(str(size) for size in (below, above) if size > 0)
        typer.echo(f"with {threadpool_count} parts the intermediate size could be {sizes}")
        raise typer.Exit(1) from None
    each = intermediate_size // threadpool_count
    typer.echo(f"yes: {threadpool_count} parts of {each} columns each")


DEBUG: dict[str, Any] = {"nan": debug_nan, "gradients": debug_gradients, "tp": debug_tp}
