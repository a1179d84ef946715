"""The process that starts engines' processes and ends what they leave, and the judge's end of it.

A judge has one watcher, forked from a fork server that has torch and nothing of the checks. The watcher forks an
engine's process for each request; daemons of an engine become its children (PR_SET_CHILD_SUBREAPER), and end with it.
It ends when the judge does. Requests and answers are JSON.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from ktverify.isolation import sandbox
from ktverify.isolation.fork_server import TRACE, collect_orphans, end_children, fork_server
from ktverify.isolation.host import end_with_parent
from ktverify.isolation.process import WAIT_S, environment_of

# seconds that a process may take to write where its threads are
_TRACE_S = 0.5
# what the fork server of engines' processes imports
PRELOAD = ("ktverify.isolation.layers", "ktverify.engines.registry", __name__)
_LAYERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "layers.py")
# environment variables that an engine does not get: they show that it is judged, on what, and where the answers are
_LEFT_OUT = ("PYTEST_", "KTVERIFY_GOLDEN_DIR", "KTVERIFY_SUITES_LOCK_HELD", "KTVERIFY_CALL_NOTE")


# ---- the watcher's process


class _Watched:
    """The engines' processes that this watcher started, and how they ended."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.alive: set[int] = set()
        self.codes: dict[int, int] = {}

    def answer(self, request: dict[str, Any]) -> int | None:
        if request["do"] == "start":
            return self._start(request)
        if request["do"] == "end" and request["pid"] in self.alive:
            self._end(request["pid"], show=request["show"])
        self._reap()
        return self.codes.get(request["pid"])

    def _start(self, request: dict[str, Any]) -> int:
        fds = [recv_handle(self.connection) for _ in range(3)]
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _become_engine(request, fds)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        for fd in fds:
            os.close(fd)
        self.alive.add(pid)
        return pid

    def _end(self, pid: int, *, show: bool) -> None:
        if show:
            # its fault handler writes where each thread is
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, TRACE)
            time.sleep(_TRACE_S)
        with contextlib.suppress(ProcessLookupError):
            if pid in self.alive:
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while pid in self.alive and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.001)

    def _reap(self) -> None:
        """Collect what has ended; what an engine's process leaves is ended with it."""
        ended = False
        for pid in list(self.alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                self.alive.discard(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                ended = True
        if ended:
            end_children(self.alive.__contains__)


def watch(descriptor: int) -> None:
    """Start and end engines' processes on request until the judge is gone; then end all that is left."""
    collect_orphans()
    sandbox.hide_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    watched = _Watched(connection)
    try:
        with contextlib.suppress(EOFError, OSError):
            while True:
                connection.send_bytes(json.dumps(watched.answer(json.loads(connection.recv_bytes()))).encode())
    finally:
        end_children()


def _become_engine(request: dict[str, Any], fds: list[int]) -> None:
    """Turn a forked process into the engine's; returns when it is over."""
    os.setsid()
    end_with_parent()
    for place, fd in enumerate((fds[1], fds[2]), start=1):
        os.dup2(fd, place)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    own = os.dup(fds[0]) if fds[0] <= 2 else fds[0]
    # nothing of the watcher's stays open: neither its connection nor another engine's
    os.closerange(3, own)
    os.closerange(own + 1, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 1 << 16 else 1 << 16)
    os.sched_setaffinity(0, request["cpus"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    sys.path[:] = request["path"] or sys.path
    sandbox.show_memory()
    sandbox.enter(request["hidden"])
    if request["python"]:
        os.set_inheritable(own, True)
        os.execve(
            request["python"],
            [request["python"], _LAYERS, request["loader"], request["spec"], str(own)],
            dict(request["env"]),
        )
    import torch

    from ktverify.isolation import layers

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(request["cpus"])))
    layers.main(request["loader"], request["spec"], own)


# ---- the judge's end


class Watcher:
    """A watcher's process, as the judge sees it. For several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._codes: dict[int, int] = {}

    def start(self, loader: str, spec: str, python: str) -> tuple[Connection, int]:
        """The connection and the pid of a new engine's process; see layers.py for the first two arguments."""
        here, there = Pipe()
        environment = environment_of(python) if python else dict(os.environ)
        request = {
            "do": "start",
            "loader": loader,
            "spec": spec,
            "python": python,
            "env": {name: value for name, value in environment.items() if not name.startswith(_LEFT_OUT)},
            "cpus": sorted(os.sched_getaffinity(0)),
            "folder": os.getcwd(),
            "path": sys.path,
            "hidden": sandbox.hidden,
        }
        with there:
            pid = self._ask(request, [there.fileno(), _descriptor(1), _descriptor(2)])
        assert pid is not None
        return here, pid

    def poll(self, pid: int) -> int | None:
        """The exit code of an engine's process, minus the signal's number; None while it runs."""
        if pid not in self._codes and (code := self._ask({"do": "poll", "pid": pid})) is not None:
            self._codes[pid] = code
        return self._codes.get(pid)

    def wait(self, pid: int) -> int | None:
        """poll() once it has ended; None where it still runs after some seconds."""
        deadline = time.monotonic() + WAIT_S
        while (code := self.poll(pid)) is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return code

    def end(self, pid: int, show: bool = False) -> None:
        """End an engine's process and what it started. show: it first writes where its threads are."""
        if pid not in self._codes:
            with contextlib.suppress(EOFError, OSError):
                self._ask({"do": "end", "pid": pid, "show": show})

    def _ask(self, request: dict[str, Any], fds: list[int] | None = None) -> int | None:
        with self._lock:
            self._connection.send_bytes(json.dumps(request).encode())
            for fd in fds or ():
                send_handle(self._connection, fd, None)
            answer: int | None = json.loads(self._connection.recv_bytes())
            return answer


def _descriptor(number: int) -> int:
    """stdout or stderr of this process; stderr for both, so that nothing an engine prints is taken for an answer."""
    return 2 if number in (1, 2) else number


_inherited: list[int] = []


def inherit(descriptor: int) -> None:
    """Use the watcher at the other end of a descriptor, which this process was started with."""
    _inherited.append(descriptor)
    sandbox.hide_memory()


@functools.cache
def watcher() -> Watcher:
    """The watcher of this process: the one that it was started with, or one of its own."""
    if _inherited:
        return Watcher(Connection(_inherited[0]))
    here, there = Pipe()
    with there:
        fork_server(PRELOAD).fork(watch, [there.fileno()], dict(os.environ), 2)
    return Watcher(here)
