"""A timed run: a head line, lines written when they are made, and a line about the load by other programs.

The commands layer, sweep, transformer and profile all measure, write and print here. Ctrl-C leaves whole lines. Imports
no torch.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from ktverify.errors import NothingMeasured
from ktverify.isolation import process
from ktverify.isolation.interrupt import INTERRUPTED
from ktverify.runs import jsonl
from ktverify.runs.jsonl import JsonLine, LineFile, new_directory, remove_if_empty
from ktverify.system import machine
from ktverify.system.machine import Machine

if TYPE_CHECKING:
    from ktverify.report.pages import View


class RunLine(JsonLine):
    """The head of a run: its folder, command, commit and machine."""

    stamp: str
    command: str
    commit: str
    machine: Machine

    @staticmethod
    def facts(directory: Path) -> dict[str, Any]:
        """These fields for the run of this process in `directory`."""
        return {
            "stamp": directory.name,
            "command": shlex.join(["python", "-m", "ktverify", *sys.argv[1:]]),
            "commit": machine.git_commit(),
            "machine": machine.read_machine(),
        }


class OtherLoadLine(JsonLine):
    """After the measurement: the share of the processors that other programs had meanwhile, 0 to 1."""

    kind: Literal["quiet"] = "quiet"
    others: float


class CeilingLine(JsonLine):
    """The machine's ceilings: bytes read and operations done, per second."""

    kind: Literal["ceiling"] = "ceiling"
    read: float
    multiply: float


def read_lines(path: Path, line: Any) -> list[Any]:
    """The lines of a run's file, without a last line that was cut off. line: the union of all kinds of lines.

    FileNotFoundError without the file, ValueError for another line that is none.
    """
    return jsonl.read_lines(path, _adapter(line).validate_json)


def lines_of_processes(module: str, requests: Iterable[BaseModel], line: Any) -> Iterator[Any]:
    """The lines that `python -m module REQUEST` prints in one new process for each request, one after the other."""
    adapter = _adapter(line)
    for request in requests:
        yield from map(adapter.validate_json, process.lines_of(module, request))


def _adapter(line: Any) -> TypeAdapter[Any]:
    return TypeAdapter(Annotated[line, Field(discriminator="kind")])


def run_pairs(head: RunLine) -> list[tuple[str, str]]:
    """(name, value) lines about a run."""
    versions = ", ".join(f"{name} {version}" for name, version in head.machine.versions.items() if name != "compiler")
    return [
        ("run", f"{head.stamp}, {head.commit or 'no checkout'}"),
        ("machine", f"{head.machine.cpu}, {head.machine.threads} threads"),
        ("versions", versions),
        ("command", head.command),
    ]


def disturbed(lines: Iterable[object]) -> str:
    """A note where other programs had so much of the processors that the times mean little, else ""."""
    return busy(line.others for line in lines if isinstance(line, OtherLoadLine))


def busy(shares: Iterable[float], where: str = "") -> str:
    """The note for shares of the processors, 0 to 1, "" for small ones; where: the times that they belong to, if not
    all."""
    from ktverify.system.timing import BUSY

    found = list(shares)
    most = max(found, default=0.0)
    if most < BUSY:
        return ""
    up_to = "up to " if len(found) > 1 else ""
    return f"other programs had {up_to}{100 * most:.0f} % of the processors{where}: these times mean little"


def measure(
    kind: str,
    file: str,
    head: Callable[..., RunLine],
    measured: Iterable[JsonLine],
    count: int,
    conclude: Callable[[Path, list[Any]], bool],
    out: Path | None,
) -> int:
    """Write a run's head and its `measured` lines, each when it is made, then call `conclude`; return the exit code.

    head: makes the head of the facts about the run; count: the number of measured lines; conclude: writes and prints
    what the lines (head first) contain, and returns whether the run is right; out: the folder, None for a new one.
    """
    directory = out if out is not None else new_directory(kind)
    lines: list[Any] = [head(**RunLine.facts(directory))]
    try:
        stopped = _collect(directory / file, lines, measured, count, kind)
    finally:
        if len(lines) == 1:
            # a head alone is no run
            (directory / file).unlink(missing_ok=True)
            remove_if_empty(directory)
    try:
        right = conclude(directory, lines)
    except NothingMeasured:
        if not stopped:
            raise
        right = True
    return INTERRUPTED if stopped else int(not right)


def conclude(
    file: Path, lines: Sequence[JsonLine], view: View | None, missing: str, as_json: bool, extra: Sequence[str] = ()
) -> bool:
    """Write the view of a run beside its file of lines, then print it, or the lines; False if its check failed.

    NothingMeasured without a view; missing: what the run then lacks. extra: names of files that are already written.
    """
    from ktverify.report import pages

    if view is None:
        raise NothingMeasured(f"{file} has {missing}")
    pages.conclude(view, lines, file, as_json, extra)
    return not any(name == "check" and text.startswith("FAIL") for name, text in view.facts)


def _collect(path: Path, lines: list[Any], measured: Iterable[JsonLine], count: int, kind: str) -> bool:
    """Append the measured lines to `lines`, and all of `lines` to a new file; True if Ctrl-C stopped it."""
    from rich.progress import track

    from ktverify.report.console import make_console

    # SIGTERM ends a run like Ctrl-C
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = make_console(stderr=True)
    file = LineFile(path)
    try:
        file.write(lines[0])
        shown = track(
            measured, kind, count, console=console, transient=True, disable=not console.is_terminal, update_period=0.2
        )
        for line in shown:
            lines.append(line)
            file.write(line)
    except KeyboardInterrupt:
        kept = f"what was measured is kept in {path}" if len(lines) > 1 else "nothing was measured yet"
        print(f"stopped; {kept}", file=sys.stderr)
        return True
    finally:
        file.close()
        signal.signal(signal.SIGTERM, before)
    return False
