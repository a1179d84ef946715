"""`verify` and `repro` outlive the engine: its crash is a verdict, and the rest is judged."""

from __future__ import annotations

import os
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ktverify.checks.target import Target
from ktverify.cli.main import app
from ktverify.cli.options import OwnProgram
from ktverify.cli.verify import Question, Step, run_steps
from ktverify.errors import EngineDied
from ktverify.isolation.calls import call_of
from ktverify.isolation.forked import Parts
from ktverify.spec.cases import Case
from ktverify.spec.names import ALL_TENSORS
from tests.support import unruly
from tests.support.command_line import python, started

CASE = "E=4,k=2,H=64,I=32,T=17,r=8,alpha=16@seed=1"
DIES = "tests.support.unruly:DiesInParts"


def test_a_signal_costs_only_the_degrees_that_it_came_in() -> None:
    done = python("-m", "ktverify", "verify", "--engine", DIES, "--case", CASE, "--tp", "all", "--steps", "2")
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    # of TP 1, 2 and 4, each judged and trained, the first is right, and so is the output of the others
    assert lines[-1] == f"FAIL {4 * len(ALL_TENSORS) - 2} of {6 * len(ALL_TENSORS)} comparisons"
    assert sum(line.startswith("PASS ") for line in lines) == 2 * len(ALL_TENSORS) + 2
    assert sum(line.endswith("CRASH backward: the process died of SIGSEGV") for line in lines) == 3
    assert "in _die" in done.stderr  # where it crashed


def test_repro_reports_an_exit_and_still_writes_the_reproducer(tmp_path: Path) -> None:
    case = f"E=4,k=2,H=32,I=32,T={unruly.EXITS},r=4,alpha=8"
    target = str(tmp_path / "case.safetensors")
    done = python("-m", "ktverify", "repro", case, "--engine", "tests.support.unruly:Unruly", "--dump", target)
    assert done.returncode == 1, done.stderr
    assert "CRASH forward_sft: the process ended with exit code 3\n" in done.stdout
    assert f"tensors in {target}" in done.stdout
    done = python(
        "-m", "ktverify", "repro", CASE, "--engine", DIES, "--tp", "2", "--stand-alone", str(tmp_path / "alone")
    )
    assert done.returncode == 1, done.stderr
    assert "CRASH backward: the process died of SIGSEGV\n" in done.stdout
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"case.safetensors", "run.py"}


def test_nothing_that_an_engine_does_when_imported_reaches_the_command(tmp_path: Path) -> None:
    engine = tmp_path / "engine.py"
    # a fork cannot compute after threads have; the started process keeps this test's pipes open while it lives
    text = f"""
import subprocess
import torch
from ktverify.engines.torch_bf16 import TorchBf16
torch.ones(700, 700) @ torch.ones(700, 700)
subprocess.Popen(["sleep", "600"])
class Engine(TorchBf16):
    stand_alone = {unruly.DiesInParts.stand_alone!r}
"""
    engine.write_text(text, encoding="utf-8")
    arguments = ["repro", CASE, "--engine", f"{engine}:Engine", "--stand-alone", str(tmp_path / "alone")]
    assert started("-m", "ktverify", *arguments).returncode == 0
    assert (tmp_path / "alone" / "run.py").is_file()
    engine.write_text("import os\nos.abort()\n", encoding="utf-8")
    done = started("-m", "ktverify", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: the stand-alone script of {engine}:Engine: CRASH import: the process died of SIGABRT"
    )


def ends_in(method: str) -> None:
    with call_of(method):
        os._exit(3)


def test_each_process_notes_its_own_calls() -> None:
    # these parts need nothing of this process but that it forks
    parts: Parts[None] = Parts([partial(ends_in, "backward"), partial(os._exit, 4)], 60.0, forks=True)
    with closing(parts):
        with pytest.raises(EngineDied, match=r"^CRASH backward: the process ended with exit code 3$"):
            parts.value(0, nullcontext())
        with pytest.raises(EngineDied, match=r"^CRASH the process ended with exit code 4$"):
            parts.value(1, nullcontext())


def test_a_part_without_tensors_that_ends_its_process_is_an_error() -> None:
    question = Question(Target("torch_bf16"), Case.parse(CASE), False, 60.0, forks=True)
    with pytest.raises(RuntimeError, match=r"^writing: CRASH the process ended with exit code 3$"):
        run_steps(question, [Step(partial(os._exit, 3), "writing", ())])


def test_an_error_in_the_forked_process_is_an_error_of_the_command() -> None:
    done = python("-m", "ktverify", "repro", CASE, "--engine", "torch_bf16", "--tp", "5")
    case = CASE.replace("@", ",data=gaussian,routing=uniform,lora=bfloat16@")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: TP 5 does not divide I = 32 of {case}\n"
    done = python("-m", "ktverify", "--traceback", "repro", CASE, "--engine", "torch_bf16", "--tp", "5")
    assert "in check_case" in done.stderr


def test_an_engine_that_leaves_when_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_script.py").write_text("import sys\n\nsys.exit('usage: a_script')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = python("-m", "ktverify", "repro", CASE, "--engine", "a_script:make")
    assert done.returncode == 2
    assert done.stderr == (
        "error: engine 'a_script:make': a_script ends the program when it is imported: exit usage: a_script\n"
    )


def not_portable() -> None:
    class Own(Exception):
        """Cannot be pickled, because it is local."""

    raise Own("of this engine")


def test_an_exception_that_cannot_be_pickled_arrives_as_text() -> None:
    own = pytest.raises(RuntimeError, match=r"Own: of this engine$")
    with closing(Parts([not_portable], 60.0, forks=True)) as parts, own:
        parts.value(0, nullcontext())


def test_only_the_program_itself_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    # this process has threads, and has computed
    with closing(Parts([os.getpid], 60.0, forks=False)) as parts:
        assert parts.value(0, nullcontext()) == os.getpid()
    forks: list[bool] = []

    def run_steps(question: Question, steps: object) -> tuple[list[object], list[str]]:
        forks.append(question.forks)
        return [], []

    monkeypatch.setattr("ktverify.cli.verify.run_steps", run_steps)
    monkeypatch.setattr("ktverify.cli.verify.conclude", lambda records, problems: None)
    for program in (None, OwnProgram()):
        assert CliRunner().invoke(app, ["verify", "--case", CASE], obj=program).exit_code == 0
    assert forks == [False, True]
