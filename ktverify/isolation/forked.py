"""Run engine calls in a disposable child process, so that a crash loses only the current part of a command's work.

EngineDied where the engine ended its process, EngineTimeout where one of its calls took too long: the next part then
gets a new process. It is a fork, made before torch or an engine has computed anything here: it costs milliseconds and
has this process's imports, environment and terminal. It leads a group, and what is started in that group ends with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from ktverify.errors import EngineDied, EngineTimeout, RemoteError
from ktverify.isolation import hosted, sandbox
from ktverify.isolation.calls import IMPORT, CallLog
from ktverify.isolation.engine_process import limit
from ktverify.isolation.host import end_with_parent
from ktverify.isolation.interrupt import put_off
from ktverify.isolation.process import Running, exchange, serve, value_of

T = TypeVar("T")

_NOTE = 128
# seconds over the limit after which a process that waits for an engine's is ended too
GRACE_S = 60.0


class Parts(Generic[T]):
    """`value` of each of `parts`, in their order. time_limit: seconds for one call of the engine.

    forks: False computes in this process. Only the program `python -m ktverify` forks: a program that calls its
    commands may have threads by then.
    """

    def __init__(self, parts: Sequence[Callable[[], T]], time_limit: float, *, forks: bool) -> None:
        self._parts, self._time_limit, self._forks = parts, time_limit, forks
        self._process: Running | None = None
        self._connection: Connection | None = None
        # shared with the process: which method of the engine it is in, and since when
        self._note = mmap.mmap(-1, _NOTE)

    def value(self, number: int, waiting: AbstractContextManager[Any]) -> T:
        """The value of part `number`. `waiting` is entered meanwhile, after the fork. It may give a function: that is
        called with the method that the engine is in."""
        if not self._forks:
            with waiting as say, watched(self._time_limit, say or str):
                return self._parts[number]()
        if self._process is None or self._connection is None:
            self._process, self._connection = self._start()
        process = self._process
        with waiting as say:

            def watch() -> bool:
                (say or str)(self._method()[1])
                return process.poll() is None

            try:
                reply = exchange(self._connection, number, watch)
            except EOFError:
                raise self._ended(process) from None
        try:
            value: T = value_of(reply)
        except RemoteError as error:
            raise RuntimeError(str(error).strip().rpartition("\n")[2]) from error
        return value

    def close(self) -> None:
        """End the process at once, and what it started: they keep nothing that matters."""
        if self._process is not None and self._connection is not None:
            self._process.end()
            self._connection.close()
            self._process = self._connection = None

    def _start(self) -> tuple[Running, Connection]:
        here, there = Pipe()
        # text in a buffer at a fork is written twice
        sys.stdout.flush()
        sys.stderr.flush()
        # the last process's method is not this one's
        self._note[:] = bytes(_NOTE)
        parent = os.getpid()
        # until this process knows which one to end, and the other one ignores Ctrl-C
        with put_off():
            pid = os.fork()
            if pid == 0:
                here.close()
                self._serve(there, parent)
            # by both, because either may be the first to need it
            os.setpgid(pid, pid)
            there.close()
            return Running(pid), here

    def _serve(self, connection: Connection, parent: int) -> None:
        """The other end; does not return."""
        code = 1
        try:
            sandbox.hide_memory()
            # what an engine starts is ended with the group
            os.setpgid(0, 0)
            end_with_parent(parent=parent)
            # Ctrl-C is for the parent, which then ends this one; a terminal would stop what is not in its foreground
            for number in (signal.SIGINT, signal.SIGTTIN, signal.SIGTTOU):
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            with watched(self._time_limit, self._write_note):
                serve(connection, lambda number: self._parts[number]())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _write_note(self, method: str) -> None:
        self._note[:] = f"{time.monotonic()} {method}".encode()[:_NOTE].ljust(_NOTE, b"\0")

    def _method(self) -> tuple[str, str]:
        """(since when, which method of the engine the process is in)."""
        since, _, method = self._note[:].rstrip(b"\0").decode(errors="replace").partition(" ")
        return since, method

    def _ended(self, process: Running) -> EngineDied:
        """How the process ended, and in which call."""
        how, code, now = process.how(), process.poll(), time.monotonic()
        self.close()
        since, method = self._method()
        where = f"{method}: " if method else ""
        # faulthandler's watch ends a process with this exit code, once it has written where each thread is
        if code == 1 and method and now - float(since) >= self._time_limit:
            return EngineTimeout(f"TIMEOUT {where}no answer after {self._time_limit:g} s")
        return EngineDied(f"CRASH {where}the process {how}")


@contextlib.contextmanager
def watched(time_limit: float, note: Callable[[str], object]) -> Iterator[None]:
    """A process that crashes in the body, or in which a call of an engine takes longer, writes a trace and ends.

    note: gets the method of the engine that is called, "" when it is over.
    """
    stderr = sys.__stderr__ or sys.stderr
    faulthandler.enable(stderr)

    def on_call(method: str) -> None:
        note(method)
        if method:
            # an engine in a process of its own is ended at the limit, and this one goes on
            grace = GRACE_S if method == IMPORT or hosted.processes() else 0.0
            faulthandler.dump_traceback_later(time_limit + grace, exit=True, file=stderr)
        else:
            faulthandler.cancel_dump_traceback_later()

    before, limit.seconds = limit.seconds, time_limit
    try:
        with CallLog(on_call):
            yield
    finally:
        limit.seconds = before
        faulthandler.cancel_dump_traceback_later()
