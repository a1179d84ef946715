"""Processes that start in milliseconds: forked from one that has imported torch, and has computed nothing.

A run needs some fifty processes, and importing torch takes each of them two seconds. So a test process keeps one
zygote, which imports what all need and forks whoever asks. No engine is imported before the fork, nor has torch used
a thread, so a forked process is as fresh as any other. Each leads a session of its own: what it starts ends with it,
also where it dies and what it started would not.
Run as `python -m ktverify.isolation.fork_server`, it is the other end of the socket.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ktverify.isolation.host import end_with_parent
from ktverify.system.paths import ROOT

_PRELOADED = ("ktverify.checks.registry",)
_NOT_YET = ("ktverify.experts", "ktverify._native")
_LENGTH = struct.Struct("<Q")
# for a process that has no more to do
WAIT_S = 10.0


def _send(connection: socket.socket, value: object, fds: Sequence[int] = ()) -> None:
    data = pickle.dumps(value)
    # a message of its own for the descriptors: they arrive with its first byte
    socket.send_fds(connection, [b"."], list(fds))
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message and its file descriptors. EOFError when the other end has gone."""
    first, fds, _, _ = socket.recv_fds(connection, 1, 8)
    if not first:
        raise EOFError
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return pickle.loads(_exactly(connection, size)), fds


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def end_group(pid: int) -> None:
    """SIGKILL to the process group that `pid` leads, as far as there is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class Forked:
    """A forked process, as its grandparent sees it."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote = zygote
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, minus the signal's number if one ended it; None while it runs."""
        if self._code is None:
            self._code = self._zygote.ask("poll", self.pid)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """poll() once it has ended. TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        """End it and its session's processes."""
        # until poll() has told its end, the zygote keeps its number from being given to another process
        if self.poll() is None:
            end_group(self.pid)
            # it may not have got as far as to lead a group
            os.kill(self.pid, signal.SIGKILL)


class Zygote:
    """The process that forks. Not for several threads at once."""

    def __init__(self) -> None:
        self._connection, other = socket.socketpair()
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # one thread: threads that torch had before the fork would be missing after it
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(other.fileno())],
            env=environment,
            cwd=ROOT,
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
        )
        other.close()
        atexit.register(self.close)

    def fork(self, function: str, fds: Sequence[int], env: Mapping[str, str], log: int) -> Forked:
        """A process that calls `function` ("package.module:name") with `fds`, in environment `env`; writes to `log`.

        The descriptors are copied into it; the caller closes its own.
        """
        return Forked(self, self.ask("fork", function, dict(env), len(fds), fds=[*fds, log]))

    def ask(self, *request: object, fds: Sequence[int] = ()) -> Any:
        """The zygote's answer. RuntimeError when it has died: an import of the suites themselves is broken then."""
        try:
            _send(self._connection, request, fds)
            return _receive(self._connection)[0]
        except (EOFError, OSError):
            code = self._ended()
            raise RuntimeError(f"the process that forks the tests' children has died with exit code {code}") from None

    def close(self) -> None:
        atexit.unregister(self.close)
        self._connection.close()
        self._ended()

    def _ended(self) -> int:
        """The exit code of one that has been left; it is ended where it does not end by itself."""
        try:
            return self._process.wait(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


_zygote: Zygote | None = None


def zygote() -> Zygote:
    """The one of this process, started when it is first wanted."""
    global _zygote
    if _zygote is None:
        _zygote = Zygote()
    return _zygote


def find(name: str) -> Callable[..., Any]:
    """The function that "package.module:name" names."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


# ---- the other end


def _become(function: str, fds: list[int], env: dict[str, str], log: int) -> int:
    """What a forked process does; its exit code."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(env)
    try:
        find(function)(*fds)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _serve(connection: socket.socket) -> None:
    """Answer until the other end has gone; the processes that it left behind are ended then."""
    alive: set[int] = set()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            (what, *rest), fds = _receive(connection)
            if what == "fork":
                function, env, count = rest
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    os._exit(_become(function, fds[:count], env, fds[count]))
                for fd in fds:
                    os.close(fd)
                alive.add(pid)
                _send(connection, pid)
            else:
                _send(connection, _exit_code(rest[0], alive))
    for pid in alive:
        end_group(pid)


def _exit_code(pid: int, alive: set[int]) -> int | None:
    """How a forked process ended, None while it runs. What it started is ended with it."""
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    # before its number is free for another process to have
    end_group(pid)
    alive.discard(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(fd: int) -> None:
    faulthandler.enable()
    # Ctrl-C is for the other end, which then closes the connection; until then its children have to be ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    for module in _PRELOADED:
        importlib.import_module(module)
    # from here on there may be children to be ended first
    end_with_parent(False)
    early = [module for module in _NOT_YET if module in sys.modules]
    if early:
        raise SystemExit(f"{early[0]} is imported by the suites' own modules; engines belong into the forked processes")
    # shared pages stay shared, and a child's collections need not look through torch's half a million objects
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=fd))


if __name__ == "__main__":
    main(int(sys.argv[1]))
