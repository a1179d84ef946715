"""JSON Lines: the one base of all lines, the one writer and the one reader. No torch here.

Each line is appended in one write, so that a killed run leaves whole lines and at most one that was cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ktverify.system.files import reports_dir, write_whole


class JsonLine(BaseModel):
    """Base of what is written as one line: frozen, no unknown fields. NaN and Inf are written as strings, so that every
    JSON reader takes the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


def new_directory(kind: str = "", reports: str | os.PathLike[str] | None = None) -> Path:
    """Make and return `reports/runs/<stamp>[-kind]`; the stamp is UTC to the second, with a number after it if taken.

    kind: bench, profile, transformer …; empty for a run of the suites. reports: the folder (default: that of the
    checkout).
    """
    runs = (Path(reports) if reports is not None else reports_dir()) / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    name = "-".join(filter(None, (time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), kind)))
    for attempt in range(1, 10_000):
        directory = runs / (name if attempt == 1 else f"{name}-{attempt:04d}")
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        return directory
    raise FileExistsError(f"{runs / name}: ten thousand runs within one second")


def remove_if_empty(directory: Path) -> None:
    """Remove the folder of a run that came to nothing; one that contains anything stays."""
    with contextlib.suppress(OSError):
        directory.rmdir()


class LineFile:
    """Appends lines to a file that this process alone writes.

    A new file by default: FileExistsError where there is one. resume: append to a file that may exist, after a last
    line that was cut off is removed; BlockingIOError where another process has it open in the same way.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | (0 if resume else os.O_EXCL), 0o666)
        except FileExistsError:
            raise FileExistsError(
                f"{path} is there already: name another folder by --out, or look at this one by --show"
            ) from None
        if resume:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                raise BlockingIOError(
                    f"{path} is being written by another run: wait for it, or name another file"
                ) from None
            os.ftruncate(self._descriptor, path.read_bytes().rfind(b"\n") + 1)

    def write(self, line: BaseModel) -> None:
        """Append one line. OSError where it could not be written whole; then nothing of it is in the file."""
        _append(self._descriptor, line.model_dump_json(), self.path)

    def close(self) -> None:
        os.close(self._descriptor)


def write_lines(path: Path, lines: Iterable[BaseModel]) -> Path:
    """Write a whole file of lines in one step."""
    return write_whole(path, "".join(line.model_dump_json() + "\n" for line in lines))


def append_line(path: Path, text: str) -> None:
    """Append one line to a file that is opened for it alone: lines of a process and its forked children do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        _append(descriptor, text, path)
    finally:
        os.close(descriptor)


def _append(descriptor: int, text: str, path: Path) -> None:
    before = os.fstat(descriptor).st_size
    data = text.encode("utf-8") + b"\n"
    if os.write(descriptor, data) != len(data):
        os.ftruncate(descriptor, before)
        raise OSError(f"{path}: the disk took only a part of a record; make room and start again")


def whole_lines(path: Path) -> list[str]:
    """The lines of a file without one that was cut off at the end. FileNotFoundError without the file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no run at {path.parent}: there is no such directory")
    if not path.is_file():
        others = ", ".join(sorted(found.name for found in path.parent.glob("*.jsonl"))) or "no lines of any run"
        raise FileNotFoundError(f"{path.parent} has no {path.name}, which this command wrote; it has {others}")
    # split bytes: a line may have been cut off inside a character
    return [line.decode("utf-8") for line in path.read_bytes().split(b"\n")[:-1] if line]
