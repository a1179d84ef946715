"""A run's folder and its file of JSON lines, each written whole the moment it is made. No torch here.

Comes in: pydantic lines. Goes out: `reports/runs/<stamp>-<kind>/`, and a file that a killed run leaves readable.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pydantic import BaseModel


def new_directory(kind: str) -> Path:
    """A fresh folder of this second for a run of `kind` (bench, profile, transformer)."""
    from ktverify.system.paths import reports_dir

    runs = reports_dir() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    for attempt in range(1, 1000):
        directory = runs / (f"{stamp}-{kind}" if attempt == 1 else f"{stamp}-{kind}-{attempt}")
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        return directory
    raise FileExistsError(f"{runs / stamp}-{kind}: a thousand runs within one second")


class LineFile:
    """Appends each line to a new file in one write. FileExistsError where the file is there already."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            raise FileExistsError(
                f"{path} is there already: name another folder by --out, or look at this one by --show"
            ) from None

    def write(self, line: BaseModel) -> None:
        """OSError where the line could not be written whole; then nothing of it is in the file."""
        before = os.fstat(self._descriptor).st_size
        data = line.model_dump_json().encode("utf-8") + b"\n"
        if os.write(self._descriptor, data) != len(data):
            os.ftruncate(self._descriptor, before)
            raise OSError(f"{self.path}: the disk took only a part of a record; make room and start again")

    def close(self) -> None:
        os.close(self._descriptor)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, one that was cut off at the end left out. FileNotFoundError without the file."""
    if path.parent.is_dir() and not path.is_file():
        others = ", ".join(sorted(found.name for found in path.parent.glob("*.jsonl"))) or "no lines of any run"
        raise FileNotFoundError(f"{path.parent} has no {path.name}, which this command wrote; it has {others}")
    # a line may have been cut off inside a character
    return [line.decode("utf-8") for line in path.read_bytes().split(b"\n")[:-1] if line]
