"""Where files are, and writing a file so that it appears whole or not at all.

Everything that ktverify writes for other programs to read (records, tables, pages, goldens) goes through `write_whole`:
a process that is killed leaves either the old file or the new one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# the folder that contains `ktverify/`: a checkout, or site-packages
ROOT = Path(__file__).resolve().parents[2]


def reports_dir() -> Path:
    """`reports/` of the checkout that contains the current directory; `reports/` in the current directory otherwise."""
    here = Path.cwd()
    for directory in (here, *here.parents):
        if (directory / "suites").is_dir() and (directory / "pyproject.toml").is_file():
            return directory / "reports"
    return here / "reports"


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write `content` (text is UTF-8) to `path` in one step: temporary file in the same directory, fsync, os.replace.

    Creates missing parent directories and returns the path. OSError as the file system reports it; `path` is then
    unchanged.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp creates private files; a report gets the mode of any other new file
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def _umask() -> int:
    """The process's umask, from /proc: the system call can only read it by setting it, which would be a race."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022
