"""Python processes that need not import torch: forks of one that has, as the engines' processes are.

Such a process has an environment, a folder, a path and a session of its own, as a new interpreter has. Tests of the
start itself, or of what is imported, use a new interpreter: command_line.started.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import faulthandler
import functools
import importlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ktverify.isolation import fork_server
from ktverify.system.files import ROOT

# what a command or a run of pytest imports for a second or more, without what pytest rewrites on import
_PRELOAD = ("ktverify.checks.registry", "ktverify.diagnose.diagnose", "ktverify.report.pages", "matplotlib.figure")


def run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` does in `folder`, with nothing but `environment`. The first argument is -m or -c.

    TimeoutExpired after `timeout` seconds. What it leaves running is ended with it.
    """
    if arguments[0] not in ("-m", "-c"):
        raise ValueError(f"the first argument is {arguments[0]!r}, it takes -m or -c")
    variables = dict(environment)
    with contextlib.ExitStack() as ends, concurrent.futures.ThreadPoolExecutor(2) as readers:
        (said, out), (complained, err) = Pipe(duplex=False), Pipe(duplex=False)
        here, there = Pipe()
        for end in (said, out, complained, err, here, there):
            ends.enter_context(end)
        # its own fork servers are forks as well
        one_thread = variables | {"OMP_NUM_THREADS": "1"}
        servers = fork_server.first_server().fork(_serve, [there.fileno()], one_thread, err.fileno())
        fds = [here.fileno(), out.fileno(), err.fileno()]
        become = functools.partial(_become_python, tuple(arguments), os.fspath(folder))
        process = fork_server.fork_server(_PRELOAD).fork(become, fds, variables, err.fileno())
        for end in (out, err, here, there):
            end.close()
        written = [readers.submit(_everything, end.fileno()) for end in (said, complained)]
        if (code := process.wait(timeout)) is None:
            process.end()
        servers.wait()
        texts = [each.result() for each in written]
    if code is None:
        raise subprocess.TimeoutExpired(list(arguments), timeout, *texts)
    return subprocess.CompletedProcess(list(arguments), code, *texts)


def _everything(descriptor: int) -> str:
    with open(descriptor, errors="replace", closefd=False) as end:
        return end.read()


def _serve(descriptor: int) -> None:
    _set_path(os.fspath(ROOT))
    fork_server.serve((), descriptor)


def _become_python(arguments: Sequence[str], folder: str, server: int, out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in (out, err):
        os.close(fd)
    # new ones, because the server's may be files, and a pipe cannot seek
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # type: ignore[misc]
    faulthandler.disable()
    faulthandler.unregister(fork_server.TRACE)
    signal.signal(fork_server.TRACE, signal.SIG_DFL)
    own = fork_server.ForkServer(Connection(server), _Elsewhere())
    fork_server.first_server = lambda: own  # type: ignore[assignment]
    os.chdir(folder)
    _set_path(folder)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    kind, what, *rest = arguments
    code = 0
    try:
        if kind == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *rest]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as leaving:
        if leaving.code is not None and not isinstance(leaving.code, int):
            print(leaving.code, file=sys.stderr)
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    raise SystemExit(code)


class _Elsewhere(fork_server.ForkedProcess):
    """The process of a server that `run` waits for."""

    def __init__(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> int:
        return 0


def _set_path(folder: str) -> None:
    """Look for modules in `folder`, in PYTHONPATH, then where the interpreter was installed."""
    own = {os.fspath(ROOT), ""}
    given = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*given, *(place for place in sys.path if place not in own)]
    importlib.invalidate_caches()
