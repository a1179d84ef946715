"""A process of the bench's engines: answers requests. Also how an object is found by its spec.

Run by path, under any Python from 3.10 on that has torch and the engine: it imports nothing of ktverify. Requests and
answers are pickles. `python host.py SERVER ARGUMENT PARENT DESCRIPTOR`: SERVER is the spec of a class, which is called
with the object that ARGUMENT names and with `module_at`. An engine that is judged has layers.py instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import importlib
import importlib.util
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


# ---- the process


def end_with_parent(on: bool = True, *, parent: int = 0) -> None:
    """End this process by SIGKILL when the thread that started it ends, also by a signal; on=False: no longer.

    parent: the pid of the process that started it; where that has ended already, this one ends at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL) if on else 0)
    if parent and os.getppid() != parent:
        os._exit(1)


# ---- the engine

HOSTED = "ktverify_hosted_"  # how the names of modules loaded from a path begin


def find(spec: str) -> Any:
    """The object "path/to/file.py:attribute" or "package.module:attribute"; the module itself without ":attribute"."""
    place, _, attribute = spec.partition(":")
    return getattr(module_at(place), attribute) if attribute else module_at(place)


def module_at(place: str | os.PathLike[str]) -> Any:
    """The module "path/to/file.py" or "package.module", loaded once."""
    place = os.fspath(place)
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    # the whole path: two files of one name are two modules
    name = HOSTED + "".join(letter if letter.isalnum() else "_" for letter in str(path))
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # its ending is .py
    assert found.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def failure(error: BaseException) -> dict[str, Any]:
    """An exception in plain values: the name of its class, its text, and whether the engine declares by it what it
    cannot do."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    unsupported = isinstance(error, NotImplementedError) and declared(error)
    return {"class": type(error).__name__, "declared": unsupported, "text": text}


def declared(error: NotImplementedError) -> bool:
    """True for a NotImplementedError that the engine, or what it called, raised to say what it cannot do.

    torch raises it for other reasons: a default device of meta, an operator without a kernel. In its Python code the
    innermost frame is torch's; from its C++ code it comes without a raise statement, and its text names the operator.
    """
    import torch

    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    # a library's function that is called from here
    callers = tuple(f"{os.path.dirname(os.path.realpath(file))}{os.sep}" for file in (__file__, torch.__file__))
    if os.path.realpath(code.co_filename).startswith(callers):
        return False
    if any(each.offset == last.tb_lasti and each.opname == "RAISE_VARARGS" for each in dis.get_instructions(code)):
        return error.__cause__ is None or not isinstance(error.__cause__, NotImplementedError)
    return not any(word in str(error) for word in ("aten::", "meta tensor", "not implemented for '", "meta backend"))


def serve(server: str, argument: str, connection: Connection) -> None:
    """Answer requests until the connection closes. An error of an import is the first answer."""
    served: Any = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = connection.recv()
            try:
                served = served or find(server)(find(argument), module_at)
                reply = {"ok": True, "result": served.answer(request)}
            except Exception as error:
                traceback.print_exc()
                reply = {"ok": False, "error": failure(error)}
            connection.send(reply)


if __name__ == "__main__":
    import faulthandler

    faulthandler.enable()
    # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python puts the folder of this file first on the path: nothing in it may shadow an installed package
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    server, argument, parent, descriptor = sys.argv[1:]
    end_with_parent(parent != "0", parent=int(parent))
    serve(server, argument, Connection(int(descriptor)))
