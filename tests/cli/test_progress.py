"""What is shown of a command that takes long: nothing while it is quick, then lines at growing intervals."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ktverify.cli import progress as shown
from ktverify.cli.progress import progress
from ktverify.training import run
from tests.support.command_line import call


def test_a_quick_command_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("small on mine") as say:
        say("forward_sft")
    assert capfd.readouterr() == ("", "")


def test_a_slow_command_says_what_it_does(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "_AFTER", (0.0, 0.01, 30.0))
    written = threading.Event()

    def note(*words: str, **more: Any) -> None:
        print(*words, **more)
        written.set()

    monkeypatch.setattr(shown, "print", note, raising=False)
    with progress("small on mine") as say:
        say("backward")
        assert written.wait(60)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] in ("small on mine: backward, 0 s", "small on mine, 0 s")


@pytest.mark.parametrize("command", ["train", "memory", "throughput"])
def test_a_training_says_what_it_does_before_its_first_step(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown, "_AFTER", (0.0, 30.0))
    written = threading.Event()

    def note(*words: str, **more: Any) -> None:
        print(*words, **more)
        written.set()

    def slow(*_: object) -> None:
        assert written.wait(60)
        raise ValueError("it ends here")

    monkeypatch.setattr(shown, "print", note, raising=False)
    monkeypatch.setattr(run, "_prepared", slow)
    (tmp_path / "a.yaml").write_text(f"model_name_or_path: a\ndataset: b\noutput_dir: {tmp_path / 'out'}\n")
    result = call(command, tmp_path / "a.yaml")
    assert result.stderr.splitlines() == ["reading the data, 0 s", "error: it ends here"]
