"""The commands `diagnose` and `debug`.

Heavy modules are imported inside the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktverify.cli.options import CaseOrMutants, CaseText, EngineName, Isa, Tensors, Tp, print_verdict
from ktverify.isolation.interrupt import importing, nothing_written

if TYPE_CHECKING:
    from ktverify.diagnose.search import Diagnosis


def diagnose(
    case: CaseOrMutants = None,
    engine: EngineName = "native",
    isa: Isa = None,
    tp: Tp = 1,
    tensor: Tensors = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
    mutants: Annotated[bool, typer.Option("--mutants", help="diagnose the engines that are wrong on purpose")] = False,
) -> None:
    """Find the cause of what is wrong with an engine.

    Hypotheses are tested on the tensors of the case and ranked by how much of the error each explains. Where the case
    passes, the checks of the contract are run until one fails: repeats, threads, updates, waiting forwards, refusals.

    \b
    Examples:  python -m ktverify diagnose small --engine my_package.layer:make_layer
               python -m ktverify diagnose 'small,T=1' --tensor grad_up_lora_a --json
               python -m ktverify diagnose --mutants lora_scale_one

    Exit code 0: nothing to explain; 1: there is something wrong.
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
    from ktverify.report.console import make_console
    from ktverify.spec.cases import Case

    parsed = Case.parse(given[0] if given else "small")
    with make_console(stderr=True).status(f"{parsed.id} on {engine}"):
        target = Target(engine, isa, tp, threads=None)
        found = search(parsed, target, tensors=check_names(tensor, True), seconds=120.0)
    if as_json:
        typer.echo(_as_json(found, engine))
    else:
        _print(found, engine, tp)
    if found.failing or found.explanations:
        raise typer.Exit(1)


def _print(found: Diagnosis, engine: str, tp: int) -> None:
    typer.echo(found.line)
    where = f"{found.case.id}, engine {engine}, TP {tp}"
    wrong = f"over budget: {', '.join(found.failing)}" if found.failing else "every tensor is within its budget"
    kind = f"; kind of cause: {found.first.cause.value}" if found.first is not None else ""
    typer.echo(f"{where}: {wrong}; {found.tried} tried{kind}")
    if found.note:
        typer.echo(found.note)
    for line in found.first.details if found.first is not None else ():
        typer.echo(f"    {line}")
    others = found.explanations[1:4]
    if others:
        typer.echo("less likely:")
    for each in others:
        typer.echo(f"    {each.cause.value}: {each.line}")


def _as_json(found: Diagnosis, engine: str) -> str:
    import json

    findings = [
        {
            "cause": each.cause.value,
            "text": each.text,
            "explains": each.share,
            "complete": each.complete,
            "evidence": list(each.details),
        }
        for each in found.explanations
    ]
    document = {
        "case": found.case.id,
        "engine": engine,
        "failing": list(found.failing),
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

    found = debug.walk_non_finite(Case.parse(case), Target(engine, isa, tp, threads=None), save)
    for line in found:
        typer.echo(line)
    if found[0] != debug.FINITE:
        raise typer.Exit(1)


def debug_gradients(
    case: CaseText,
    engine: EngineName = "native",
    isa: Isa = None,
    tp: Tp = 1,
) -> None:
    """Print differences, norms, cosine and the worst index of each tensor.

    \b
    Example:  python -m ktverify debug gradients small --engine my_package.layer:make_layer
    """
    from ktverify.checks.target import Target
    from ktverify.diagnose.debug import gradient_rows
    from ktverify.report.console import make_console, print_grid
    from ktverify.report.grid import Grid
    from ktverify.spec.cases import Case

    note, rows = gradient_rows(Case.parse(case), Target(engine, isa, tp, threads=None))
    print_grid(make_console(), Grid.of(rows, note, left=("worst",)))


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
