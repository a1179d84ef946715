"""JSON Lines: the one base of all lines, the one writer and the one reader. No torch here.

A line is in the file whole or not at all, also on a full disk; only a process that is killed while it writes may leave
a line that was cut off. Readers leave that one out and name it.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ktverify.system.files import reports_dir, unwritten, write_whole
from ktverify.system.text import decode

T = TypeVar("T")


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
    line that was cut off is removed; BlockingIOError where another process has it open in the same way. OSError that
    names the file where it cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | (0 if resume else os.O_EXCL), 0o666)
        except FileExistsError:
            raise FileExistsError(
                f"{path} is there already: name another folder by --out, or look at this one by --show"
            ) from None
        except OSError as error:
            raise unwritten(path, error) from None
        if resume:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                raise BlockingIOError(
                    f"{path} is being written by another run: wait for it, or name another file"
                ) from None
            content = path.read_bytes()
            *lines, torn = content.split(b"\n")
            if torn:
                print(f"{_torn(path, len(lines) + 1, torn)} and is removed", file=sys.stderr)
                os.ftruncate(self._descriptor, len(content) - len(torn))

    def write(self, line: BaseModel) -> None:
        """Append one line. OSError where it could not be written whole; then nothing of it is in the file."""
        _append(self._descriptor, line.model_dump_json(), self.path)

    def close(self) -> None:
        os.close(self._descriptor)


def with_named_floats(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, in which NaN and Inf are "NaN", "Infinity" and "-Infinity", as JsonLine writes them; float() reads
    these texts."""
    return {key: _named(value) if isinstance(value, float) else value for key, value in values.items()}


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON of a flat mapping, NaN and Inf as texts: JSON itself has no such numbers."""
    return json.dumps(with_named_floats(values), indent=indent, allow_nan=False)


def _named(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def write_lines(path: Path, lines: Iterable[BaseModel]) -> Path:
    """Write a whole file of lines in one step."""
    return write_whole(path, "".join(line.model_dump_json() + "\n" for line in lines))


def append_line(path: Path, text: str) -> None:
    """Append one line to a file that is opened for it alone: lines of a process and its forked children do not mix.

    OSError that names the file where the line could not be written whole; then nothing of it is in the file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritten(path, error) from None
    try:
        # one process at a time, so that none cuts off the line of another; some file systems have no locks
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _append(descriptor, text, path)
    finally:
        os.close(descriptor)


def _append(descriptor: int, text: str, path: Path) -> None:
    before = os.fstat(descriptor).st_size
    # a killed process may have left the beginning of a line, which must not become that of this one
    torn = before > 0 and os.pread(descriptor, 1, before - 1) != b"\n"
    left = memoryview((b"\n" if torn else b"") + text.encode("utf-8") + b"\n")
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except BaseException as error:
        os.ftruncate(descriptor, before)
        if isinstance(error, OSError):
            raise unwritten(path, error) from None
        raise


def read_lines(path: Path, parse: Callable[[str], T], *, lost: list[str] | None = None) -> list[T]:
    """What `parse` makes of each line of a file; a ValueError of it means that the line cannot be read.

    The last line may lack its end, because its process was killed while it wrote: it is left out, and a sentence that
    names it is added to `lost`, or printed on stderr without `lost`. Any other line that cannot be read raises
    ValueError, with the file and the line's number; with `lost`, it is left out and named as well. FileNotFoundError
    without the file.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no run at {path.parent}: there is no such directory")
    if not path.is_file():
        others = ", ".join(sorted(found.name for found in path.parent.glob("*.jsonl"))) or "no lines of any run"
        raise FileNotFoundError(f"{path.parent} has no {path.name}, which this command wrote; it has {others}")
    found: list[T] = []
    named: list[str] = []
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = decode(data, path).encode()
    # split bytes: a line may have been cut off inside a character
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(parse(line.decode("utf-8")))
        except ValueError as error:
            # what was cut off begins as a record does; a disk may have filled the rest of its block with zeros
            cut = number == len(lines) and (line.lstrip().startswith(b"{") or not line.strip(b"\0"))
            if cut or (lost is not None and not line.rstrip().endswith(b"}")):
                named.append(_torn(path, number, line))
                continue
            text = f"{path}, line {number} cannot be read: {_reason(error)}"
            if lost is None:
                raise ValueError(text) from None
            named.append(text)
    if lost is not None:
        lost += named
    elif named:
        print(f"{named[0]} and is left out", file=sys.stderr)
    return found


def read_objects(path: Path) -> list[dict[str, Any]]:
    """`read_lines` of JSON objects of any kind."""

    def parse(text: str) -> dict[str, Any]:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object")
        return found

    return read_lines(path, parse)


def _torn(path: Path, number: int, line: bytes) -> str:
    return f"{path}, line {number} was cut off while it was written ({line[:60].decode('utf-8', 'replace')!r})"


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])} {first['msg']}".strip()
