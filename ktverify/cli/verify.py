"""The command `verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from ktverify.cli import engine_calls as calls
from ktverify.cli.options import EngineName, Isa, Method, OwnProgram, Threads, TimeLimit, check_choice
from ktverify.spec.cases import Case


def verify(
    context: typer.Context,
    mode: Annotated[str, typer.Option(help="forward, backward, training or all")] = "all",
    method: Method = "AMXBF16_SFT",
    tp: Annotated[str, typer.Option(help="no-tp, tp (every degree above 1 that the case has) or all")] = "no-tp",
    case: Annotated[str | None, typer.Option(help="a case as repro takes it (default: a Qwen3-30B-A3B shape)")] = None,
    engine: EngineName = "native",
    isa: Isa = None,
    threads: Threads = None,
    fresh: Annotated[int | None, typer.Option(metavar="SEED", help="draw new inputs from this seed")] = None,
    steps: Annotated[int, typer.Option(help="training steps", min=2)] = 10,
    time_limit: TimeLimit = 900,
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
    check_choice("--mode", mode, calls.MODES)
    parsed = Case.parse(case or calls.DEFAULT_CASE)
    from ktverify.checks.accuracy import METHODS
    from ktverify.checks.target import Target
    from ktverify.engines.run import METHOD

    check_choice("--method", method, METHODS)
    if fresh is not None:
        parsed = parsed.with_seed(fresh)
    degrees = calls.tp_degrees(parsed, tp)
    if mode == "training" and method != METHOD:
        raise ValueError(f"--mode training steps the LoRA parameters, which {method} has no gradients for")
    target = Target(engine, isa, threads=threads, method=method)
    question = calls.Question(target, parsed, fresh is not None, time_limit, isinstance(context.obj, OwnProgram))
    typer.echo(f"{parsed.id}: {parsed.why}")
    todo = calls.call_steps(question, degrees, mode) if mode != "training" else []
    if mode in ("training", "all") and method == METHOD:
        todo += calls.training_steps(question, degrees, steps)
    calls.conclude(*calls.run_steps(question, todo))
