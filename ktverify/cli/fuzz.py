"""The command `fuzz`: random sequences of calls of an engine. Light."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ktverify.cli import options
from ktverify.cli.progress import progress
from ktverify.isolation.interrupt import importing


def fuzz(
    engine: options.EngineName = "native",
    isa: Annotated[str, typer.Option(help="one instruction set (default: all in turn)")] = "all",
    minutes: Annotated[float, typer.Option(help="how long", min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option(help="of the first session; each next one has the next seed", min=0)] = 0,
    sessions: Annotated[int | None, typer.Option(help="at most so many", min=1)] = None,
    time_limit: options.TimeLimit = 300,
) -> None:
    """Random sequences of calls, each result compared with a new layer's bits and with the oracle. Exit code 1 if one
    is wrong.

    A session is one layer of random sizes and a dozen calls: forwards, backwards, updates, new weights, bad input,
    threads, forks, tensors of any strides. Its seed repeats it; its calls are printed.

    \b
    Examples:  python -m ktverify fuzz --minutes 5
               python -m ktverify fuzz --seed 1234 --sessions 1 --isa avx2
    """
    with importing():
        from ktverify.checks import fuzz as fuzzing
        from ktverify.checks import isas
        from ktverify.checks.registry import PRELOAD
        from ktverify.checks.target import Target
        from ktverify.engines import registry
        from ktverify.errors import Unsupported
        from ktverify.isolation.child import DEFAULT, ChildPool

    planned = isas.planned(engine, isa)
    made = calls = compared = 0
    reasons: dict[str, int] = {}
    deadline = time.monotonic() + 60 * minutes
    with (
        progress("fuzz") as say,
        ChildPool(DEFAULT.but(time_limit, None), preload=PRELOAD) as pool,
    ):
        while time.monotonic() < deadline and (sessions is None or made < sessions):
            # sessions of one instruction set follow each other, because each set needs a process of its own
            chosen = planned[made // 16 % len(planned)]
            number = seed + made
            try:
                found = pool.get(chosen.env).call(fuzzing.run_session, Target(engine, chosen.name), number)
            except Unsupported as error:
                reasons[str(error)] = reasons.get(str(error), 0) + 1
                found = (0, 0)
            except Exception as error:
                again = f"--seed {number} --sessions 1" + (f" --isa {chosen.id}" if chosen.name else "")
                typer.echo(f"FAIL session {number} on {chosen.label or engine}: {error}")
                typer.echo(f"    python -m ktverify fuzz{registry.option(engine)} {again}")
                raise typer.Exit(1) from None
            made, calls, compared = made + 1, calls + found[0], compared + found[1]
            say(f"{made} sessions, {calls} calls")
    for reason, times in reasons.items():
        typer.echo(f"UNSUPPORTED {times} sessions: {reason}")
    passed = compared > 0
    text = f"{made} sessions, {calls} calls, {compared} results compared, on {', '.join(i.id for i in planned)}"
    typer.echo(f"{'PASS' if passed else 'FAIL'} {text}")
    if not passed:
        raise typer.Exit(1)
