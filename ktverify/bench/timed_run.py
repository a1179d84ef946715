"""What every timed run has: a head line, lines written the moment they are made, a last line about the neighbours.

Comes in: an iterator that measures. Goes out: its lines, in a file and in a list. Ctrl-C leaves whole lines. No torch.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ktverify.errors import NothingMeasured
from ktverify.runs.jsonl import LineFile
from ktverify.system import machine
from ktverify.system.machine import Machine


class BenchLine(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class RunLine(BenchLine):
    """A run: which, by which command, where."""

    stamp: str
    command: str
    commit: str
    machine: Machine

    @staticmethod
    def facts(directory: Path) -> dict[str, Any]:
        """The four of the run that this process is, in `directory`."""
        return {
            "stamp": directory.name,
            "command": shlex.join(["python", "-m", "ktverify", *sys.argv[1:]]),
            "commit": machine.git_commit(),
            "machine": machine.read_machine(),
        }


class OtherLoadLine(BenchLine):
    """Behind what was measured: the share of the processors that other programs had meanwhile, 0 to 1."""

    kind: Literal["quiet"] = "quiet"
    others: float


class CeilingLine(BenchLine):
    """The machine's ceilings: bytes read and operations done, per second."""

    kind: Literal["ceiling"] = "ceiling"
    read: float
    multiply: float


def run_pairs(head: RunLine) -> list[tuple[str, str]]:
    """(name, value) lines about a run."""
    versions = ", ".join(f"{name} {version}" for name, version in head.machine.versions.items() if name != "compiler")
    return [
        ("run", f"{head.stamp}, {head.commit or 'no checkout'}"),
        ("machine", f"{head.machine.cpu}, {head.machine.threads} threads"),
        ("versions", versions),
        ("command", head.command),
    ]


def disturbed(lines: Iterable[object]) -> list[str]:
    """A note where other programs had so much of the processors that the times mean little."""
    return busy(line.others for line in lines if isinstance(line, OtherLoadLine))


def busy(shares: Iterable[float], where: str = "") -> list[str]:
    """The same of shares of the processors, 0 to 1; where: of which times, if not of all."""
    from ktverify.system.other_load import BUSY

    found = list(shares)
    most = max(found, default=0.0)
    if most < BUSY:
        return []
    up_to = "up to " if len(found) > 1 else ""
    return [f"other programs had {up_to}{100 * most:.0f} % of the processors{where}: these times mean little"]


def collect(path: Path, head: RunLine, measured: Iterable[BenchLine], steps: int, what: str) -> tuple[list[Any], bool]:
    """All lines, the head first, each appended to `path` when it is made; and whether Ctrl-C stopped it.

    steps: how many lines `measured` will have, for the bar on a terminal.
    """
    from rich.progress import track

    from ktverify.report.console import make_console

    # a terminated run ends like an interrupted one
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = make_console(stderr=True)
    lines: list[Any] = [head]
    file = LineFile(path)
    try:
        file.write(head)
        shown = track(
            measured, what, steps, console=console, transient=True, disable=not console.is_terminal, update_period=0.2
        )
        for line in shown:
            lines.append(line)
            file.write(line)
    except KeyboardInterrupt:
        print(f"stopped; what was measured is kept in {path}", file=sys.stderr)
        return lines, True
    finally:
        file.close()
    return lines, False


def if_there_is_any(stopped: bool) -> contextlib.AbstractContextManager[None]:
    """For the views of a run: one that was stopped before anything counted has none, which is no error."""
    return contextlib.suppress(NothingMeasured) if stopped else contextlib.nullcontext()
