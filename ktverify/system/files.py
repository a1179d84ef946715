"""Where files are, and writing a file so that it appears whole or not at all.

Everything that ktverify writes for other programs to read (records, tables, pages, goldens) goes through `write_whole`:
a process that is killed leaves either the old file or the new one.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# the folder that contains `ktverify/`: a checkout, or site-packages
ROOT = PACKAGE.parent
IN_CLONE = (ROOT / "suites").is_dir() and (ROOT / "pyproject.toml").is_file()
# a clone has them beside the package, a wheel inside it
SUITES = ROOT / "suites" if IN_CLONE else PACKAGE / "suites"
GOLDENS = ROOT / "golden" if IN_CLONE else PACKAGE / "golden"
EXAMPLES = ROOT / "examples" if IN_CLONE else PACKAGE / "examples"


def suites(family: str = "") -> str:
    """What a command of pytest takes for the suites, or for one family of them."""
    return f"suites/{family}" if IN_CLONE else f"--pyargs ktverify.suites{family and '.'}{family}"


# what to type where a clone is needed
_WHERE = "" if IN_CLONE else " in a clone of ktverify"
RUN_SUITES, MAKE_PEERS = f"`pytest {suites()} -n 4`", f"`make peers`{_WHERE}"
MAKE_LLAMAFACTORY = f"`make llamafactory`{_WHERE}"


def install_command(extra: str) -> str:
    """How to install what `extra` of pyproject.toml names: into a clone's environment, or beside an installed wheel."""
    return pip_install(f"-e '.[{extra}]'" if IN_CLONE else f"'ktverify[{extra}]'")


def document(name: str) -> str:
    """Where a page of docs/ is; a wheel has none."""
    return f"docs/{name}.md{_WHERE}"


def pip_install(packages: str) -> str:
    """`pip install`, in a clone with the versions that its constraints name."""
    return f"pip install {'-c constraints.txt ' if IN_CLONE else ''}{packages}"


def expand(path: str) -> str:
    """`path` with ~ and $VARIABLE replaced, as a shell does; a $ in the name of a file or folder that exists stays.

    ValueError for a variable that is not set, for a user who does not exist, and for a NUL character."""
    if "\0" in path:
        raise ValueError(f"{path!r} has a NUL character; a path takes none")
    home = os.path.expanduser(path)
    there = home
    while there and not os.path.lexists(there):
        there = there.rpartition("/")[0]
    rest = home[len(there) :]
    for variable in re.finditer(r"\$(?:(\w+)|\{([^}]*)\})", rest, re.ASCII):
        if (variable[1] or variable[2]) not in os.environ:
            raise ValueError(f"{path!r} has the variable {variable[0]}, which is not set")
    found = os.path.expanduser(there + os.path.expandvars(rest))
    if found.startswith("~"):
        user = found.partition("/")[0]
        raise ValueError(f"{path!r} begins with {user}, and there is no such user; ./{user} is a folder of that name")
    return found


def search_in(folder: str | os.PathLike[str]) -> None:
    """Modules that are found nowhere else are looked for in `folder`, here and in processes that start from now on."""
    place = os.path.abspath(folder)
    if place not in sys.path:
        sys.path.append(place)
    paths = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    if place not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, place])


def reports_dir() -> Path:
    """`reports/` of the checkout that contains the current directory; `reports/` in the current directory otherwise."""
    here = Path.cwd()
    for directory in (here, *here.parents):
        if (directory / "suites").is_dir() and (directory / "pyproject.toml").is_file():
            return directory / "reports"
    return here / "reports"


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write `content` (text is UTF-8) to `path` in one step: temporary file in the same directory, fsync, os.replace.

    Creates missing parent directories and returns the path. OSError that names the file where the file system takes no
    more; `path` is then unchanged.
    """
    target = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    name = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp creates private files; a report gets the mode of any other new file
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException as error:
        if name:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritten(target, error) from None
        raise
    return target


_ROOM, _PLACE = "make room, or name another folder", "name a folder that can be written"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _PLACE),
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
}


def unwritten(path: str | os.PathLike[str], error: OSError) -> OSError:
    """The error of a file that could not be written, of the same class: its path, the reason, what to do."""
    advice = _ADVICE.get(error.errno or 0, "")
    text = f"{os.fspath(path)} cannot be written: {error.strerror or error}{advice and '; '}{advice}"
    found = type(error)(text)
    found.errno = error.errno
    return found


def in_words(error: OSError) -> str:
    """The text of an error of the file system: the file, where it is known, and the reason, without the number."""
    if not error.strerror:
        return str(error)
    advice = _ADVICE.get(error.errno or 0, "")
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}{advice and '; '}{advice}"


def _umask() -> int:
    """The process's umask, from /proc: the system call can only read it by setting it, which would be a race."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022
