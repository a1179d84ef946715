"""`verify` and `repro` outlive the engine: what takes its process down is a verdict, and the rest is judged."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from ktverify import supervised
from ktverify.names import ALL_TENSORS
from suites.support import unruly
from suites.support.zygote import ROOT

CASE = "E=4,k=2,H=64,I=32,T=17,r=8,alpha=16@seed=1"
DIES = "suites.support.unruly:DiesInParts"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ktverify", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_signal_costs_the_degrees_that_it_came_in() -> None:
    done = run("verify", "--engine", DIES, "--case", CASE, "--tp", "all", "--steps", "2")
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    # of TP 1, 2 and 4, each judged and trained, the first is right
    assert lines[-1] == f"FAIL {4 * len(ALL_TENSORS)} of {6 * len(ALL_TENSORS)} comparisons"
    assert sum(line.startswith("PASS ") for line in lines) == 2 * len(ALL_TENSORS)
    assert sum(line.endswith("CRASH backward: the process died of SIGSEGV") for line in lines) == 5
    assert "in _die" in done.stderr  # where it died


def test_repro_tells_an_exit_and_still_writes_what_a_maintainer_needs(tmp_path: Path) -> None:
    case = f"E=4,k=2,H=32,I=32,T={unruly.EXITS},r=4,alpha=8"
    target = str(tmp_path / "case.safetensors")
    done = run("repro", case, "--engine", "suites.support.unruly:Unruly", "--dump", target)
    assert done.returncode == 1, done.stderr
    assert "CRASH forward_sft: the process ended with exit code 3\n" in done.stdout
    assert f"tensors in {target}" in done.stdout
    done = run("repro", CASE, "--engine", DIES, "--tp", "2", "--stand-alone", str(tmp_path / "alone"))
    assert done.returncode == 1, done.stderr
    assert "CRASH backward: the process died of SIGSEGV\n" in done.stdout
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"case.safetensors", "run.py"}


def test_what_is_refused_there_is_refused_here() -> None:
    done = run("repro", CASE, "--engine", "torch_bf16", "--tp", "5")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: TP 5 does not divide I = 32 of "
        + CASE.replace("@", ",data=gaussian,routing=uniform,lora=bfloat16@")
        + "\n"
    )
    done = run("--traceback", "repro", CASE, "--engine", "torch_bf16", "--tp", "5")
    assert "in check_case" in done.stderr


def test_an_engine_that_leaves_when_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_script.py").write_text("import sys\n\nsys.exit('usage: a_script')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run("repro", CASE, "--engine", "a_script:make")
    assert done.returncode == 2
    assert done.stderr == (
        "error: engine 'a_script:make': a_script ends the program when it is imported: exit usage: a_script\n"
    )


def test_only_the_program_itself_forks() -> None:
    # this process has threads, and has computed
    assert not supervised.forks
    parts = supervised.Parts([os.getpid], 60.0)
    assert parts.value(0, nullcontext()) == os.getpid()
    parts.close()
