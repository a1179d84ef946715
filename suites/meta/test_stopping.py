"""Ctrl-C: one line, exit code 130, and nothing that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ktverify import doctor
from ktverify.cli import app
from ktverify.golden import __main__ as golden
from ktverify.golden import store
from ktverify.stopping import INTERRUPTED, USUAL

ROOT = Path(__file__).resolve().parents[2]


def stop(*arguments: object, **more: object) -> None:
    raise KeyboardInterrupt


def told(result: Result) -> str:
    """The one line of a stopped command."""
    assert result.exit_code == INTERRUPTED, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("stopped")]
    assert "Traceback" not in result.output
    return line


def test_every_command_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", stop)
    assert told(CliRunner().invoke(app, ["doctor"])) == USUAL


def test_goldens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "regenerate", stop)
    assert told(CliRunner().invoke(golden.app, ["regenerate", "--check"])) == USUAL


def test_a_training_tells_what_is_kept_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktverify.training.journal import Journal

    def at_three(self: Journal, args: object, state: object, control: object, **more: object) -> None:
        if getattr(state, "global_step", 0) == 3:
            raise KeyboardInterrupt

    tiny, output = tmp_path / "tiny", tmp_path / "out"
    assert CliRunner().invoke(app, ["make-tiny", "qwen3_moe", "--out", str(tiny)]).exit_code == 0
    settings = {"model_name_or_path": tiny, "output_dir": output, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    command = [
        "train",
        "examples/minimal.yaml",
        *(word for key in settings for word in (f"--{key}", f"{settings[key]}")),
    ]
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(Journal, "on_step_end", at_three)
        line = told(CliRunner().invoke(app, command))
        early = told(CliRunner().invoke(app, [*command, "--overwrite_output_dir", "true", "--save_steps", "9"]))
    again = "the same command with --resume_from_checkpoint true goes on from there"
    assert line == f"stopped at step 3 of 4; {output}/checkpoint-2 and loss.jsonl are kept: {again}"
    assert early.startswith(f"stopped at step 3 of 4; {output} has no checkpoint yet: begin anew")


def test_what_runs_in_the_checkout_ends_with_the_command() -> None:
    inside = "print(__import__('os').getpid(), flush=True); __import__('time').sleep(600)"
    program = f"from ktverify import power; power._in_checkout('timeit', ['-n1', '-r1', {inside!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    below = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    for _ in range(100):
        if not Path(f"/proc/{below}").exists():
            return
        time.sleep(0.05)
    os.kill(below, signal.SIGKILL)
    pytest.fail("it goes on")
