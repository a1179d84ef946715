"""The command `replay`: judge an engine on calls that were captured in a training. Light."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli import options
from ktverify.cli.verify import Found, Question, Step, conclude, run_steps

if TYPE_CHECKING:
    from ktverify.runs.record import AccuracyRecord


def replay(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="captured calls, or folders of them")],
    engine: options.EngineName = "native",
    isa: options.Isa = None,
    tp: options.Tp = 1,
    threads: options.Threads = None,
    time_limit: options.TimeLimit = 900,
) -> None:
    """Judge an engine on calls that were captured in a training. Exit code 1 if a tensor is wrong.

    KTVERIFY_CAPTURE=DIR in front of a training writes the calls: routing, sizes, and the spread of the tensors; see
    docs/training.md. Weights come from the generator of the cases, so a file has nothing of the model or the data.

    \b
    Examples:  KTVERIFY_CAPTURE=calls python -m ktverify train examples/qwen3_moe.yaml
               python -m ktverify replay calls --engine my_package.layer:make_layer
    """
    paths = [path for given in files for path in (sorted(given.glob("*.safetensors")) if given.is_dir() else [given])]
    if not paths:
        raise ValueError(f"{', '.join(map(str, files))}: no captured calls (*.safetensors) are there")
    from ktverify.checks import accuracy as checking
    from ktverify.checks.problem import LiveOracle, Problem
    from ktverify.checks.repro_commands import replay_command
    from ktverify.checks.target import Target
    from ktverify.diagnose.hook import add_cause
    from ktverify.spec import captured
    from ktverify.spec.names import ALL_TENSORS

    target = Target(engine, isa, tp, threads)
    # all are read before the first is judged
    calls = {path: captured.read(path) for path in paths}
    records: list[AccuracyRecord] = []
    for path, call in calls.items():

        def run(call: captured.Captured = call) -> Found:
            inputs = captured.inputs_of(call)
            problem = Problem(call.case, inputs, LiveOracle.of(inputs), "fresh")
            result = checking.check_case(target, call.case, problem=problem)
            add_cause(result, target)
            return result.records, []

        without = "" if "grad_output" in call.spread else "; it had no backward, so grad_output has a spread of 1"
        sizes = call.case.spec.replace("routing=uniform", "routing=captured")
        typer.echo(f"{path}: layer {call.layer}, call {call.call}: {sizes}{without}")
        question = Question(target, call.case, True, time_limit, isinstance(context.obj, options.OwnProgram))
        step = Step(run, f"{path.name} on {engine}", ALL_TENSORS, tp, "fresh")
        again = replay_command(target, path)
        records += [each.model_copy(update={"repro": again}) for each in run_steps(question, [step])[0]]
    conclude(records, [])
