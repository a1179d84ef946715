"""Where an engine raised an exception: which call, and the innermost line of the engine's own code.

The traceback leads from this package's calling code into the engine, and often further into a library such as torch.
The line that helps is the last one that belongs to the engine.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

from ktverify.errors import RemoteError
from ktverify.isolation.calls import CONSTRUCTOR, IMPORT, METHODS
from ktverify.system.printable import shown_line

_PACKAGE = Path(__file__).resolve().parents[1]
# the rooms and modules that call engines; the others are called by them, or are engines
_CALLERS = tuple(
    str(_PACKAGE / name)
    for name in (
        "checks/", "isolation/", "diagnose/", "cli/", "bench/", "training/", "reproducer/", "engines/run.py",
        "engines/registry.py",
    )
)  # fmt: skip
_ENGINES = (str(_PACKAGE / "engines/"), str(_PACKAGE / "mutants/"))
_LIBRARIES = tuple({f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# the attribute of an exception that came from another process, where its traceback is not
_ORIGIN = "ktverify_origin"
# the attribute of one that came from an engine's process
_OUTSIDE = "ktverify_outside"

Origin = tuple[str, str]


def origin_of(error: BaseException) -> Origin:
    """(call, place) of an exception: ("forward_sft", "my_engine.py:7").

    call: the method of the engine, CONSTRUCTOR for what makes a layer. ("", "") where no line of an engine raised it.
    """
    kept: Origin | None = getattr(error, _ORIGIN, None)
    if kept is not None:
        return kept
    frames = traceback.extract_tb(error.__traceback__)
    last = max((at for at, frame in enumerate(frames) if _calls(frame.filename)), default=-1)
    inside = [frame for frame in frames[last + 1 :] if not frame.filename.startswith("<")]
    own = [frame for frame in inside if not frame.filename.startswith(_LIBRARIES)]
    method = next((frame for frame in inside if frame.name in METHODS), None)
    if not own and method is not None and not _folder(method.filename).endswith("/torch"):
        # an engine that is installed like a library
        own = [frame for frame in inside if _folder(frame.filename) == _folder(method.filename)]
    # what is raised in the suite's own rooms is no engine's
    if last < 0 or not own or (own[0].filename.startswith(f"{_PACKAGE}/") and not own[0].filename.startswith(_ENGINES)):
        return "", ""
    call = METHODS[method.name] if method is not None else CONSTRUCTOR
    return call, f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def keep_origin(error: BaseException) -> None:
    """Note the origin in the exception itself, so that it is still known in another process."""
    origin = origin_of(error)
    if origin != ("", ""):
        setattr(error, _ORIGIN, origin)


def set_origin(error: BaseException, call: str, place: str) -> None:
    """Note the origin of an exception that an engine's process raised; place: "my_engine.py:7"."""
    setattr(error, _ORIGIN, (call, place))
    setattr(error, _OUTSIDE, True)


def of_an_outside_engine(error: BaseException) -> bool:
    """True where a call of an engine that is no part of this package raised it, in the engine's own process."""
    # what the import raises has a text that says where
    return getattr(error, _OUTSIDE, False) and origin_of(error)[0] != IMPORT


def describe(error: BaseException, call: str = "") -> str:
    """One line on what an engine raised: "forward_sft: ValueError: … (my_engine.py:7)".

    call: the method, where the caller knows it. Without an origin and a call only "ValueError: …".
    """
    where, place = origin_of(error)
    text = shown_line(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))
    # the text of a RemoteError names the class that could not be raised here
    kind = "" if isinstance(error, RemoteError) else type(error).__name__
    parts = (call or where, kind, text)
    return ": ".join(filter(None, parts)) + (f" ({place})" if place else "")


def _calls(filename: str) -> bool:
    return os.path.abspath(filename).startswith(_CALLERS)


def _folder(filename: str) -> str:
    """The folder of a package below a folder of libraries: "…/site-packages/kt_kernel" for all of its files."""
    library = max((each for each in _LIBRARIES if filename.startswith(each)), key=len, default="")
    return library + filename.removeprefix(library).partition("/")[0]
