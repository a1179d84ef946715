"""Ctrl-C: a command ends at once, with one line and exit code 130, keeps what is whole and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from ktverify.checks import registry
from ktverify.cli import doctor
from ktverify.cli.golden import app as golden_app
from ktverify.isolation.interrupt import INTERRUPTED, USUAL
from ktverify.isolation.process import processes_of
from ktverify.judge import golden_regenerate
from ktverify.mutants import kills, right_engines
from ktverify.mutants.kills import Exceeded, KillTable
from ktverify.mutants.right_engines import CleanRun
from ktverify.system.files import ROOT
from tests.support import unruly
from tests.support.command_line import call, ends

SECONDS = 30.0  # time to end, on a busy machine


def awaited(condition: Callable[[], bool], seconds: float) -> bool:
    """True once `condition` holds, False where it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def imports_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def hangs(pid: int) -> bool:
    """The engine of tests.support.unruly hangs."""
    return "going to sleep" in Path(f"/proc/{pid}/fd/2").read_text(encoding="utf-8")


def stopped(arguments: list[str], when: Callable[[int], bool]) -> str:
    """The stderr of `python -m ktverify …` with a Ctrl-C as soon as `when` is true of its pid."""
    command = [sys.executable, "-m", "ktverify", *arguments]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(command, cwd=ROOT, stderr=log, start_new_session=True) as started,
    ):
        try:
            assert awaited(lambda: when(started.pid), 120)
            family = processes_of(started.pid)
            os.killpg(started.pid, signal.SIGINT)
            code = started.wait(timeout=SECONDS)
            log.seek(0)
            assert code == INTERRUPTED, log.read()
        finally:
            started.kill()
        assert awaited(lambda: not any(map(_lives, family)), SECONDS)
        log.seek(0)
        return log.read()


def _lives(process: psutil.Process) -> bool:
    # an ended process stays a zombie until its new parent reaps it
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


# the command, the process that counts semaphores, and those that compute: one has started, or both
@pytest.mark.parametrize(("command", "processes"), [("mutants", 4), ("clean", 4), ("clean", 3)])
def test_ctrl_c_ends_every_process(command: str, processes: int) -> None:
    said = stopped([command, "--jobs", "2"], lambda pid: len(processes_of(pid)) >= processes)
    assert said.strip().splitlines()[-1] == "stopped; nothing was written"
    assert "Traceback" not in said


@pytest.mark.parametrize("arguments", [["clean"], ["diagnose", "--mutants"]], ids=" ".join)
def test_ctrl_c_while_torch_is_imported(arguments: list[str]) -> None:
    assert stopped(arguments, imports_torch) == "stopped; nothing was written\n"


def test_ctrl_c_ends_an_engine_that_hangs() -> None:
    case = f"E=4,k=2,H=32,I=32,T={unruly.HANGS},r=4,alpha=8"
    arguments = ["verify", "--engine", "tests.support.unruly:Unruly", "--case", case]
    said = stopped(arguments, hangs)
    assert said.splitlines()[-1] == USUAL
    assert "Traceback" not in said


def test_ctrl_c_ends_a_hosted_engine_and_what_it_started(tmp_path: Path) -> None:
    engine, sign = tmp_path / "engine.py", tmp_path / "sign"
    text = f"""
import pathlib, subprocess, time
from ktverify import Hosted
def hang(**_):
    subprocess.Popen(["sleep", "600"])
    pathlib.Path({str(sign)!r}).touch()
    time.sleep(600)
make = Hosted({f"{engine}:hang"!r})
"""
    engine.write_text(text, encoding="utf-8")
    arguments = ["verify", "--engine", f"{engine}:make", "--case", "E=4,k=2,H=32,I=32,T=3,r=4,alpha=8"]
    assert stopped(arguments, lambda pid: sign.exists()).splitlines()[-1] == USUAL


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def stopped_line(result: Result) -> str:
    """The one line of a stopped command."""
    ends(result, INTERRUPTED)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("stopped")]
    return line


def test_every_command_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", stop)
    monkeypatch.setattr(golden_regenerate, "regenerate", stop)
    assert stopped_line(call("doctor")) == USUAL
    assert stopped_line(CliRunner().invoke(golden_app, ["regenerate", "--check"])) == USUAL


def test_a_stopped_training_reports_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktverify.training.trainer import LossLog

    def at_three(self: LossLog, args: object, state: object, control: object, **more: object) -> None:
        if getattr(state, "global_step", 0) == 3:
            raise KeyboardInterrupt

    tiny, output = tmp_path / "tiny", tmp_path / "out"
    ends(call("make-tiny", "qwen3_moe", "--out", tiny), 0)
    settings = {"model_name_or_path": tiny, "output_dir": output, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    command = [
        "train",
        "examples/minimal.yaml",
        *(word for key in settings for word in (f"--{key}", f"{settings[key]}")),
    ]
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(LossLog, "on_step_end", at_three)
        line = stopped_line(call(*command))
        early = stopped_line(call(*command, "--overwrite_output_dir", "true", "--save_steps", "9"))
    again = "the same command with --resume_from_checkpoint true goes on from there"
    assert line == f"stopped at step 3 of 4; {output}/checkpoint-2 and loss.jsonl are kept: {again}"
    assert early.startswith(f"stopped at step 3 of 4; {output} has no checkpoint yet: begin anew with --")


def test_a_stopped_search_for_false_alarms_tells_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(*_: object, **__: object) -> Iterator[list[CleanRun]]:
        yield [CleanRun("torch_bf16", 7, compared=9)]
        yield [CleanRun("everything", 7, compared=9, failed=["output of small"])]
        raise KeyboardInterrupt

    monkeypatch.setattr(right_engines, "judge_all", judged)
    result = call("clean")
    assert stopped_line(result) == "stopped after 2 of 200 runs, 1 with a FAIL; nothing was written"
    assert result.stderr.splitlines()[0] == "everything: output of small"


def test_a_stopped_table_of_mutants_tells_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(result: KillTable, jobs: int) -> Iterator[str]:
        result.checks = 3
        result.kills["lora_scale_one"]["forward/small"] = [Exceeded("rel_l2", 30.0, "output of small")]
        yield "forward/small"
        raise KeyboardInterrupt

    monkeypatch.setattr(kills, "run", run)
    line = stopped_line(call("mutants", "lora_scale_one", "tp_part_lost"))
    of = len(registry.of_any_engine())
    assert line == f"stopped after 3 of {of} checks, which kill 1 of 2 mutants; nothing was written"
