"""A process with torch imported that forks others on request, in milliseconds instead of the seconds of a start.

No engine is imported before the fork, nor has torch used a thread, so a forked process is as fresh as any other. Each
leads a session of its own: what it starts ends with it, also where it crashes.
`python -m ktverify.isolation.fork_server FD` is the first server of a process; those that import more are its forks.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from ktverify.isolation.host import end_with_parent
from ktverify.isolation.process import WAIT_S, Running, children_of, end_group, own_environment, reap
from ktverify.system.files import ROOT

# what every forked process needs, and what none may have yet
_ALWAYS = ("torch",)
_NOT_YET = ("ktverify.engines.native.layer", "ktverify._native")
# makes a process write where its threads are
TRACE = signal.SIGUSR2
_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h


class ForkedProcess(Running):
    """A process that the fork server started. The server reaps it, and ends what it started."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        super().__init__(pid)
        self._server = server

    def _reap(self) -> int | None:
        code: int | None = self._server.ask("poll", self.pid)
        return code


class ForkServer:
    """A process that forks, at the other end of a connection. For one thread at a time."""

    def __init__(self, connection: Connection, process: subprocess.Popen[bytes] | ForkedProcess) -> None:
        self._connection, self._process = connection, process
        atexit.register(self.close)

    def fork(self, function: Callable[..., None], fds: list[int], env: dict[str, str], log: int) -> ForkedProcess:
        """A process that calls `function(*fds)` in environment `env` and writes its output to the descriptor `log`.

        All descriptors are copied into it; the caller closes its own.
        """
        return ForkedProcess(self, self.ask("fork", function, len(fds), env, fds=[*fds, log]))

    def ask(self, *request: object, fds: Sequence[int] = ()) -> Any:
        """The server's answer. RuntimeError when it has ended: a preloaded module cannot be imported then."""
        try:
            self._connection.send(request)
            for fd in fds:
                send_handle(self._connection, fd, None)
            return self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the fork server has ended with exit code {self._end()}") from None

    def close(self) -> None:
        atexit.unregister(self.close)
        self._connection.close()
        self._end()

    def _end(self) -> int | None:
        """The exit code once the connection is closed; the server is ended where it does not end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if (code := self._process.wait(timeout=WAIT_S)) is not None:
                return code
        os.kill(self._process.pid, signal.SIGKILL)
        return self._process.wait()


@functools.cache
def fork_server(preload: tuple[str, ...]) -> ForkServer:
    """The fork server of this process for these modules, started on first use: a fork of the one without modules."""
    here, there = Pipe()
    with there:
        return ForkServer(
            here, first_server().fork(functools.partial(serve, preload), [there.fileno()], _environment(), 2)
        )


@functools.cache
def first_server() -> ForkServer:
    """The fork server that imports torch, for this process and for its other servers."""
    here, there = Pipe()
    with there:
        fd = there.fileno()
        command = [sys.executable, "-m", __name__, str(fd)]
        process = subprocess.Popen(command, env=_environment(), cwd=ROOT, pass_fds=[fd], stdin=subprocess.DEVNULL)
    return ForkServer(here, process)


def _environment() -> dict[str, str]:
    # one thread: threads that torch had before the fork would be missing after it
    return {**own_environment(), "OMP_NUM_THREADS": "1"}


def collect_orphans() -> None:
    """From now on, descendants of this process whose parent ends become its children."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_children(kept: Callable[[int], bool] = lambda pid: False, codes: dict[int, int] | None = None) -> None:
    """End all children but those that are kept, and what becomes a child thereby. codes: gets their exit codes."""
    deadline = time.monotonic() + WAIT_S
    while (others := [pid for pid in children_of("self") if not kept(pid)]) and time.monotonic() < deadline:
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in others:
            with contextlib.suppress(ChildProcessError):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended and codes is not None:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.001)


def _become(function: Callable[..., None], fds: list[int], env: dict[str, str], log: int) -> int:
    """Run a forked process; its exit code."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(env)
    faulthandler.register(TRACE, file=sys.__stderr__ or 2)
    try:
        function(*fds)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _serve_forks(connection: Connection) -> None:
    """Answer until the other end closes; the processes that it left behind are ended then."""
    alive: set[int] = set()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            what, *rest = connection.recv()
            if what == "fork":
                function, count, env = rest
                *fds, log = [recv_handle(connection) for _ in range(count + 1)]
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    os._exit(_become(function, fds, env, log))
                for fd in (*fds, log):
                    os.close(fd)
                alive.add(pid)
                connection.send(pid)
            else:
                code = reap(rest[0])
                if code is not None:
                    alive.discard(rest[0])
                    # what led a session of its own
                    end_children(alive.__contains__)
                connection.send(code)
    for pid in alive:
        end_group(pid)
    end_children()


def serve(preload: Sequence[str], fd: int) -> None:
    """Import modules, then fork on request until the other end of the connection closes."""
    # Ctrl-C is for the other end, which then closes the connection; until then its children have to be ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    for module in (*_ALWAYS, *preload):
        importlib.import_module(module)
    # from here on there may be children to be ended first
    end_with_parent(False)
    collect_orphans()
    early = [module for module in _NOT_YET if module in sys.modules]
    if early:
        raise RuntimeError(f"{early[0]} is imported by a preloaded module; engines belong into the forked processes")
    # shared pages stay shared, and a child's collections need not look through torch's half a million objects
    gc.collect()
    gc.freeze()
    _serve_forks(Connection(fd))


if __name__ == "__main__":
    faulthandler.enable()
    serve((), int(sys.argv[1]))
