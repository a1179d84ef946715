"""Work on an engine that may take its process down: part by part, in a process that dies alone.

Comes in: parts, functions without arguments. Goes out: each one's value, what it raised, or EngineDied where it ended
its process or a call did not come back; the next part then gets a new process.
The process is a fork, made before torch or an engine has computed anything here: it costs milliseconds and has this
one's imports, environment and terminal, to write to. It leads a group, and what is started in that ends with it.
Only the program `python -m ktverify` forks; another that calls its commands may have threads by then, and computes in
its own process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import pickle
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
from ktverify.isolation.host import end_with_parent
from ktverify.isolation.interrupt import put_off
from ktverify.isolation.process import how_it_ended

T = TypeVar("T")

forks = False
# how often the waiting parent looks at the process: what it started may hold the pipe open after it
_WATCH_S = 0.05
# for a process that has closed its end of the pipe
_GRACE_S = 10.0
_NOTE = 128


class Parts(Generic[T]):
    """`value` of each of `parts`, in their order. time_limit: seconds for one call of the engine."""

    def __init__(self, parts: Sequence[Callable[[], T]], time_limit: float) -> None:
        self._parts, self._time_limit = parts, time_limit
        self._pid = 0
        self._connection: Connection | None = None
        # shared with the process: which method of the engine it is in, and since when
        self._note = mmap.mmap(-1, _NOTE)

    def value(self, number: int, waiting: AbstractContextManager[Any]) -> T:
        """What part `number` returns; EngineDied where it does not. `waiting` is entered meanwhile, after the fork."""
        if not forks:
            with watched(self._time_limit, lambda method: None), waiting:
                return self._parts[number]()
        connection = self._connection or self._start()
        with waiting:
            try:
                connection.send(number)
                while not connection.poll(_WATCH_S):
                    if os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) and not connection.poll():
                        raise EOFError
                answer = connection.recv()
            except (EOFError, OSError):
                raise self._ended() from None
        if len(answer) == 1:
            value: T = answer[0]
            return value
        error, trace = answer
        raise error from RemoteError(trace)

    def close(self) -> None:
        """End the process at once, and what it started: they keep nothing that matters."""
        if self._connection is not None:
            self._reaped()

    def _start(self) -> Connection:
        here, there = Pipe()
        # what stands in a buffer at a fork is written twice
        sys.stdout.flush()
        sys.stderr.flush()
        # the last process's method is not this one's
        self._note[:] = bytes(_NOTE)
        parent = os.getpid()
        # until this process knows what to end, and the other one that it is not meant
        with put_off():
            self._pid = os.fork()
            if self._pid == 0:
                here.close()
                self._serve(there, parent)
            # by both, since either may be the first to need it
            os.setpgid(self._pid, self._pid)
            there.close()
            self._connection = here
        return here

    def _serve(self, connection: Connection, parent: int) -> None:
        """The other end; does not return."""
        code = 1
        try:
            # what an engine starts is ended with the group
            os.setpgid(0, 0)
            end_with_parent(parent=parent)
            # Ctrl-C is for the parent, which then ends this one; a terminal would stop what is not in its foreground
            for number in (signal.SIGINT, signal.SIGTTIN, signal.SIGTTOU):
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            with watched(self._time_limit, self._noted), contextlib.suppress(EOFError):
                while True:
                    connection.send(self._answer(connection.recv()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _answer(self, number: int) -> tuple[Any, ...]:
        try:
            return (self._parts[number](),)
        except Exception as error:
            told = portable(error) or RuntimeError(f"{type(error).__name__}: {error}")
            return told, traceback.format_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _noted(self, method: str) -> None:
        self._note[:] = f"{time.monotonic()} {method}".encode()[:_NOTE].ljust(_NOTE, b"\0")

    def _ended(self) -> EngineDied:
        """How the process ended, and in which call; it is ended where it has only closed its pipe."""
        deadline = time.monotonic() + _GRACE_S
        while os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
            time.sleep(0.01)
        now, code = time.monotonic(), self._reaped()
        since, _, method = self._note[:].rstrip(b"\0").decode(errors="replace").partition(" ")
        where = f"{method}: " if method else ""
        # faulthandler's watch ends a process with this exit code, once it has written where each thread is
        if code == 1 and method and now - float(since) >= self._time_limit:
            return EngineTimeout(f"TIMEOUT {where}no answer after {self._time_limit:g} s")
        return EngineDied(f"CRASH {where}the process {how_it_ended(code)}")

    def _reaped(self) -> int:
        """Its exit code, once it and what it started are ended."""
        assert self._connection is not None
        # before its number is free for another process to have
        os.killpg(self._pid, signal.SIGKILL)
        self._connection.close()
        self._connection = None
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


@contextlib.contextmanager
def watched(time_limit: float, note: Callable[[str], None]) -> Iterator[None]:
    """Where this process dies in it, or a call of an engine lasts longer, a trace is left on stderr; then it ends.

    note: told the method of the engine that is called, "" when it is over.
    """
    from ktverify.engines import run

    to = sys.__stderr__ or sys.stderr
    faulthandler.enable(to)

    def told(method: str) -> None:
        note(method)
        if method:
            faulthandler.dump_traceback_later(time_limit, exit=True, file=to)
        else:
            faulthandler.cancel_dump_traceback_later()

    before, run.on_call = run.on_call, told
    try:
        yield
    finally:
        run.on_call = before
        faulthandler.cancel_dump_traceback_later()


def portable(error: BaseException) -> BaseException | None:
    """`error` if it survives a pickle round trip with its text, else None."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return copy if type(copy) is type(error) and str(copy) == str(error) else None
