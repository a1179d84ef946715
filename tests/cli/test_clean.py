"""Right engines on new inputs: the command that counts them, and that it would notice a wrong one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ktverify.checks.isas import Isa
from ktverify.cli.clean import Run, Subject, judge, main, print_runs, subjects
from ktverify.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


def test_command_runs_every_right_engine() -> None:
    everyone = [subject.label for subject in subjects()]
    runs = str(len(everyone))
    command = [
        sys.executable,
        "-m",
        "ktverify",
        "clean",
        "--runs",
        runs,
        "--jobs",
        "1",
        "--cases",
        "one_token_odd,tiny",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"PASS {len(everyone)} of {len(everyone)} runs")
    rows = {match[1]: match[2] for match in re.finditer(r"^(\S+(?: \S+)*) +1 +(\d+) ", done.stdout, re.MULTILINE)}
    assert sorted(rows) == sorted(everyone)
    assert all(int(tensors) >= 9 for tensors in rows.values()), rows


def test_wrong_engine_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    engine = MUTANTS["lora_scale_one"].engine
    right, wrong = judge(1, [Subject("torch_bf16", Isa()), Subject(engine, Isa())], "small")
    assert (right.bad, wrong.bad) == (False, True)
    print_runs([right, wrong], "small")
    said = capsys.readouterr().out
    assert said.startswith("FAIL 1 of 2 runs")
    assert f"python -m ktverify repro 'small@seed=1' --engine {engine} --fresh" in said


def test_run_that_compared_nothing_is_no_pass() -> None:
    assert Run("torch_bf16", 1).bad
    assert not Run("torch_bf16", 1, compared=1).bad


def test_cases_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        main(cases="nosuch")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == "error: --cases nosuch: it matches none of the tiny default cases\n"
