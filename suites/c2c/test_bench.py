"""What `bench` has beside c2c and no other test looks at: the clock on a GPU, the JSON lines of shapes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from ktverify import machine
from ktverify.bench import record
from ktverify.bench.clock import Clock
from ktverify.cli import app

if TYPE_CHECKING:
    from collections.abc import Iterator


class Event:
    """A CUDA event without a device."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: object) -> float:
        return 2.5


def test_the_clock_takes_the_events_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = []
    seen: list[tuple[str, list[str]]] = []

    @contextmanager
    def device(name: str) -> Iterator[None]:
        current.append(name)
        yield
        current.pop()

    monkeypatch.setattr("torch.cuda.device", device)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: seen.append(("wait", list(current))))
    assert Clock("cuda:1").time(lambda: seen.append(("call", list(current)))) == 2_500_000
    assert seen == [("wait", ["cuda:1"]), ("call", ["cuda:1"]), ("wait", ["cuda:1"])]


def test_an_earlier_run_is_printed_as_lines(tmp_path: Path) -> None:
    journal = record.Journal(tmp_path)
    head = record.HeadLine(
        stamp="s", command="c", commit="", machine=machine.read_machine(), engines=(), threads=1, rounds=1, warmup=3,
        runs=1, isa="",
    )  # fmt: skip
    journal.add(head)
    journal.close()
    done = CliRunner().invoke(app, ["bench", "--show", str(tmp_path), "--json"])
    assert done.exit_code == 1  # nothing was measured, so nothing was right
    assert [record.HeadLine.model_validate_json(line) for line in done.stdout.splitlines()] == [head]
