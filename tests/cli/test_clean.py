"""`clean`: right engines pass on new inputs, and a wrong engine would be noticed."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from ktverify.checks.isas import Isa
from ktverify.cli.main import app
from ktverify.mutants import MUTANTS
from ktverify.mutants.right_engines import CleanRun, RightEngine, failures_of, judge, right_engines, verdict_lines


def test_command_runs_every_right_engine() -> None:
    everyone = [engine.label for engine in right_engines()]
    cases = ["--cases", "one_token_odd,tiny"]
    done = CliRunner().invoke(app, ["clean", "--runs", str(len(everyone)), "--jobs", "1", *cases])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"PASS {len(everyone)} of {len(everyone)} runs")
    rows = {match[1]: match[2] for match in re.finditer(r"^(\S+(?: \S+)*) +1 +(\d+) ", done.stdout, re.MULTILINE)}
    assert sorted(rows) == sorted(everyone)
    assert all(int(tensors) >= 9 for tensors in rows.values()), rows


def test_wrong_engine_is_noticed() -> None:
    engine = MUTANTS["lora_scale_one"].engine
    right, wrong = judge(1, [RightEngine("torch_bf16", Isa()), RightEngine(engine, Isa())], "small")
    assert (right.bad, wrong.bad) == (False, True)
    assert verdict_lines([right, wrong], "small")[0].startswith("FAIL 1 of 2 runs")
    said = "\n".join(failures_of([right, wrong]))
    assert f"python -m ktverify repro 'small@seed=1' --engine {engine} --fresh" in said


def test_run_that_compared_nothing_is_bad() -> None:
    assert CleanRun("torch_bf16", 1).bad
    assert not CleanRun("torch_bf16", 1, compared=1).bad


def test_unknown_cases_are_refused() -> None:
    done = CliRunner().invoke(app, ["clean", "--cases", "nosuch"])
    assert done.exit_code == 2
    assert done.stderr == "error: --cases nosuch: it matches none of the tiny default cases\n"
