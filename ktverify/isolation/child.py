"""Python processes that call functions for this one, so that a crash costs one test and not the run.

`Child(env)` starts one; `child.call(function, ...)` returns the function's value or raises its exception here. A child
that ends instead raises EngineDied with the signal and the last lines of its output.

A run needs some fifty of them, and importing torch takes each one two seconds. So a test process keeps one fork server,
which imports what all of them need and forks on request. No engine is imported before the fork, nor has torch used a
thread, so a forked process is as fresh as any other. Each leads a session of its own: what it starts ends with it, also
where it crashes. `python -m ktverify.isolation.child FD MODULE ...` is the server.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from ktverify.errors import EngineDied, EngineOutOfMemory, EngineRaised, EngineTimeout, RemoteError, Unsupported
from ktverify.isolation import locks
from ktverify.isolation.calls import CallNote, method_in, noted
from ktverify.isolation.host import end_with_parent
from ktverify.isolation.interrupt import put_off
from ktverify.isolation.origin import keep_origin, told
from ktverify.isolation.process import (
    WAIT_S,
    Log,
    Running,
    end_group,
    exchange,
    own_environment,
    reap,
    resident_of,
    serve,
    value_of,
)
from ktverify.system.files import ROOT

# what every forked process needs, and what none may have yet
_ALWAYS = ("torch",)
_NOT_YET = ("ktverify.engines.native.layer", "ktverify._native")
# several tests compute at once; torch's own threads, which spin for a processor that another test has, cost minutes
_SHARED_CPU = {"OMP_NUM_THREADS": "1"}
# makes a process write where its threads are; seconds that it may take for that
_TRACE, _TRACE_S = signal.SIGUSR2, 1.0


@dataclass(frozen=True)
class Limits:
    """Limits of one call. time_s: seconds on the clock; memory: resident bytes of the process and its descendants."""

    time_s: float
    memory: int

    def but(self, time_s: float | None, memory_gib: float | None) -> Limits:
        """The limits with those that are not None in place of these."""
        memory = self.memory if memory_gib is None else int(memory_gib * 2**30)
        return Limits(self.time_s if time_s is None else time_s, memory)


# Big cases take turns, so that one of them and three others fit into 16 GiB; see ktverify/isolation/locks.py
DEFAULT, BIG = Limits(300.0, 3 << 30), Limits(900.0, 7 << 30)


def raised_by_the_engine(error: BaseException) -> bool:
    """True for an exception from `Child.call` that is a crash: a check reports what it finds as an AssertionError."""
    remote = isinstance(error.__cause__, RemoteError) and not isinstance(error, AssertionError)
    return remote or isinstance(error, RemoteError)


class Child(contextlib.AbstractContextManager["Child"]):
    """One process that answers calls until it is closed. For one thread at a time.

    env: variables that it has besides this process's. preload: modules that its fork server imports beforehand.
    """

    def __init__(
        self, env: Mapping[str, str] | None = None, *, limits: Limits = DEFAULT, preload: tuple[str, ...] = ()
    ) -> None:
        self._busy = False
        self.limits = limits
        self._log = Log()
        self._connection, there = Pipe()
        self._note = CallNote()
        environment = {**os.environ, **_SHARED_CPU, locks.HELD_BY_PARENT: "1", **self._note.environment, **(env or {})}
        self._process = fork_server(preload).fork(answer_calls, there.fileno(), environment, self._log.fileno())
        there.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The value of `function` called in the child. It is pickled by reference: a function of a module.

        Raises its exception (RemoteError where that cannot be pickled), Unsupported for NotImplementedError, or
        EngineDied, EngineTimeout, EngineOutOfMemory.
        """
        self._called = name_of(function)
        self._busy = True
        try:
            watch = functools.partial(self._watch, time.monotonic() + self.limits.time_s)
            reply = exchange(self._connection, (function, args, kwargs), watch)
        except EOFError:
            raise self._died(EngineDied, f"the process {self._process.how()}") from None
        self._busy = False
        try:
            return value_of(reply)
        except NotImplementedError as error:
            raise Unsupported(str(error)) from error.__cause__

    def _watch(self, deadline: float) -> bool:
        """False once the child has ended. Ends it where it exceeds its limits, and raises which one."""
        used, limit = resident_of(self._process.pid), self.limits.memory
        if used > limit:
            text = f"{used / 2**30:.1f} GiB were resident, the limit is {limit / 2**30:.1f} GiB"
            raise self._ended(EngineOutOfMemory, text)
        if self.alive and time.monotonic() > deadline:
            raise self._ended(EngineTimeout, f"no answer after {self.limits.time_s:g} s, ended with SIGKILL")
        return self.alive

    def _ended(self, kind: type[EngineDied], text: str) -> EngineDied:
        """End the process, once it has written where its threads are."""
        size = len(self._log.text())
        os.kill(self._process.pid, _TRACE)
        give_up = time.monotonic() + _TRACE_S
        while len(self._log.text()) == size and self.alive and time.monotonic() < give_up:
            time.sleep(0.01)
        self._process.end()
        return self._died(kind, text)

    def _died(self, kind: type[EngineDied], text: str) -> EngineDied:
        """The exception: the function that was called, the engine's method that it was in, what happened."""
        words = self._log.last_words()
        call = self._note.call() or method_in(words)
        where = f"{self._called}, in {call}" if call else self._called
        error = kind(f"{where}: {text}; last words:\n{words or '(none)'}")
        error.call = call
        return error

    def close(self) -> None:
        self._connection.close()
        # a call that was interrupted need not be waited for
        if self._busy:
            self._process.end()
        self._process.how()
        self._log.close()
        self._note.close()


class ChildPool(contextlib.AbstractContextManager["ChildPool"]):
    """Children by their environment, one alive at a time: four test processes and their children fit into 16 GiB."""

    def __init__(self, limits: Limits = DEFAULT, big: Limits = BIG, preload: tuple[str, ...] = ()) -> None:
        self.limits, self.big = limits, big
        self._preload = preload
        self._child: Child | None = None
        self._kind: tuple[dict[str, str], bool] = ({}, False)

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, env: Mapping[str, str] | None = None, *, big: bool = False) -> Child:
        """A living child with this environment: the last one if it fits, else a new one in its place.

        A child for `big` cases keeps gigabytes, so no other test goes on with it.
        """
        wanted = (dict(env or {}), big)
        if self._child is None or not self._child.alive or self._kind != wanted:
            self.close()
            limits = self.big if big else self.limits
            self._child, self._kind = Child(env, limits=limits, preload=self._preload), wanted
        return self._child

    def call_fresh(
        self, function: Callable[..., Any], /, *args: Any, env: Mapping[str, str] | None = None, **kwargs: Any
    ) -> Any:
        """One call in a process of its own, beside the child that is kept; see Child.call."""
        with Child(env, limits=self.limits, preload=self._preload) as child:
            return child.call(function, *args, **kwargs)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def name_of(function: Callable[..., Any]) -> str:
    """`package.module:name` of a function, or of the one that a partial calls."""
    inner = getattr(function, "func", function)
    return f"{inner.__module__}:{inner.__qualname__}"


def answer_calls(descriptor: int) -> None:
    """The other end: make the calls that come over the connection."""
    with noted():
        serve(Connection(descriptor), _answer)


def _answer(request: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Any:
    function, given, named = request
    try:
        return function(*given, **named)
    except SystemExit as leaving:
        # an engine may not end the process that calls it
        raise EngineRaised(f"CRASH {told(leaving)}") from leaving
    except Exception as error:
        keep_origin(error)
        raise


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `jobs` processes. They end with this process, however it ends, and at once where the body raises."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)
    try:
        # Ctrl-C reaches all processes of a terminal; this one ends the others, which would each show a traceback
        with put_off():
            for _ in range(jobs):
                pool.submit(os.getpid)
        yield pool
    except BaseException:
        # nothing uses their results any more
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _prepare() -> None:
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None  # it is spawned
    end_with_parent(parent=parent.pid or 0)
    torch.set_num_threads(1)
    # a layer's release collects garbage, and need not look through modules
    gc.collect()
    gc.freeze()


# ---- the fork server


class ForkedProcess(Running):
    """A process that the fork server started. The server reaps it, and ends what it started."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        super().__init__(pid)
        self._server = server

    def _reap(self) -> int | None:
        code: int | None = self._server.ask("poll", self.pid)
        return code


class ForkServer:
    """The process that forks. For one thread at a time. preload: modules that it imports before."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._connection, other = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(other.fileno()), *preload],
            # one thread: threads that torch had before the fork would be missing after it
            env={**own_environment(), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
        )
        other.close()
        atexit.register(self.close)

    def fork(self, function: Callable[[int], None], fd: int, env: dict[str, str], log: int) -> ForkedProcess:
        """A process that calls `function(fd)` in environment `env` and writes its output to the descriptor `log`.

        Both descriptors are copied into it; the caller closes its own.
        """
        return ForkedProcess(self, self.ask("fork", function, env, fds=[fd, log]))

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

    def _end(self) -> int:
        """The exit code once the connection is closed; the server is ended where it does not end by itself."""
        try:
            return self._process.wait(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


@functools.cache
def fork_server(preload: tuple[str, ...]) -> ForkServer:
    """The fork server of this process for these modules, started on first use."""
    return ForkServer(preload)


def _become(function: Callable[[int], None], fd: int, env: dict[str, str], log: int) -> int:
    """Run a forked process; its exit code."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(env)
    faulthandler.register(_TRACE, file=sys.__stderr__ or 2)
    try:
        function(fd)
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
                function, env = rest
                fds = [recv_handle(connection) for _ in range(2)]
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    os._exit(_become(function, fds[0], env, fds[1]))
                for fd in fds:
                    os.close(fd)
                alive.add(pid)
                connection.send(pid)
            else:
                code = reap(rest[0])
                if code is not None:
                    alive.discard(rest[0])
                connection.send(code)
    for pid in alive:
        end_group(pid)


def _main(fd: int, preload: Sequence[str]) -> None:
    faulthandler.enable()
    # Ctrl-C is for the other end, which then closes the connection; until then its children have to be ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    for module in (*_ALWAYS, *preload):
        importlib.import_module(module)
    # from here on there may be children to be ended first
    end_with_parent(False)
    early = [module for module in _NOT_YET if module in sys.modules]
    if early:
        raise SystemExit(f"{early[0]} is imported by a preloaded module; engines belong into the forked processes")
    # shared pages stay shared, and a child's collections need not look through torch's half a million objects
    gc.collect()
    gc.freeze()
    _serve_forks(Connection(fd))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
