"""The command `repro`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktverify.cli.engine_calls import Found, Question, Step, run_steps
from ktverify.cli.options import CaseText, EngineName, Isa, Method, OwnProgram, Tensors, Threads, TimeLimit, Tp
from ktverify.spec.cases import Case


def repro(
    context: typer.Context,
    case: CaseText,
    engine: EngineName = "native",
    isa: Isa = None,
    tensor: Tensors = None,
    tp: Tp = 1,
    threads: Threads = None,
    method: Method = "AMXBF16_SFT",
    fresh: Annotated[bool, typer.Option("--fresh", help="compare with the live oracle, not with the golden")] = False,
    dump: Annotated[Path | None, typer.Option(help="save inputs, actual and expected as safetensors")] = None,
    stand_alone: Annotated[
        Path | None,
        typer.Option("--stand-alone", metavar="DIR", help="write a folder that repeats it without ktverify"),
    ] = None,
    time_limit: TimeLimit = 900,
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

    question = Question(target, parsed, fresh, time_limit, isinstance(context.obj, OwnProgram))
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
