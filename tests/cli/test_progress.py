"""What is shown of a command that takes long: nothing while it is quick, then lines at growing intervals."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ktverify.cli import progress as shown
from ktverify.cli.progress import progress


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
