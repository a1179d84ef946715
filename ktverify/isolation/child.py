"""Python processes that call functions for this one, so that a crash costs one test and not the run.

`Child(env)` starts one; `child.call(function, ...)` returns the function's value or raises its exception here. A child
that ends instead raises EngineDied with the signal and the last lines of its output.

A run needs some fifty of them, and importing torch takes each one two seconds: fork_server.py forks them. An engine of
the user's does not run in such a process, but in one of its own (hosted.py): what a child sends is unpickled here.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from ktverify.errors import EngineDied, EngineOutOfMemory, EngineRaised, EngineTimeout, RemoteError, Unsupported
from ktverify.isolation import hosted, locks, watcher
from ktverify.isolation.calls import CallNote, method_in, noted
from ktverify.isolation.fork_server import TRACE, fork_server
from ktverify.isolation.host import end_with_parent
from ktverify.isolation.interrupt import put_off
from ktverify.isolation.origin import describe, keep_origin
from ktverify.isolation.process import (
    Log,
    Running,
    exchange,
    processes_of,
    resident_of,
    serve,
    value_of,
)

# several tests compute at once; torch's own threads, which spin for a processor that another test has, cost minutes
_SHARED_CPU = {"OMP_NUM_THREADS": "1"}
# seconds that a process may take to write where its threads are
_TRACE_S = 1.0


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

    env: variables that it has besides this process's. preload: modules that its fork server imports beforehand. hosts:
    start its watcher with it, from which it gets engines' processes (hosted.py); otherwise it starts one when needed.
    """

    def __init__(
        self,
        env: Mapping[str, str] | None = None,
        *,
        limits: Limits = DEFAULT,
        preload: tuple[str, ...] = (),
        hosts: bool = False,
    ) -> None:
        self._busy = False
        self.limits = limits
        self._log = Log()
        self._connection, there = Pipe()
        self._note = CallNote()
        environment = {**os.environ, **_SHARED_CPU, locks.HELD_BY_PARENT: "1", **self._note.environment, **(env or {})}
        fds, self._watcher = [there.fileno()], None
        with contextlib.ExitStack() as ends:
            ends.enter_context(there)
            if hosts:
                judge, own = (ends.enter_context(end) for end in Pipe())
                servers = fork_server(watcher.PRELOAD)
                self._watcher = servers.fork(watcher.watch, [own.fileno()], environment, self._log.fileno())
                fds.append(judge.fileno())
            self._process = fork_server(preload).fork(answer_calls, fds, environment, self._log.fileno())

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
        # an engine's process that died in an earlier call wrote there too
        self._log.forget()
        try:
            watch = functools.partial(self._watch, time.monotonic() + self.limits.time_s)
            reply = exchange(self._connection, (function, args, kwargs), watch)
        except EOFError:
            raise self._died(EngineDied, f"the process {self._process.how()}") from None
        self._busy = False
        try:
            return value_of(reply)
        except EngineDied as died:
            # an engine's process, which writes where this one's child does
            raise self._died(type(died), died.how, died.call) from None
        except NotImplementedError as error:
            raise Unsupported(str(error)) from error.__cause__

    def _watch(self, deadline: float) -> bool:
        """False once the child has ended. Ends it where it exceeds its limits, and raises which one."""
        used, limit = sum(resident_of(process.pid) for process in self._processes), self.limits.memory
        if used > limit:
            text = f"{used / 2**30:.1f} GiB were resident, the limit is {limit / 2**30:.1f} GiB"
            raise self._ended(EngineOutOfMemory, text)
        alive = self.alive
        if alive and time.monotonic() > deadline:
            raise self._ended(EngineTimeout, f"no answer after {self.limits.time_s:g} s, ended with SIGKILL")
        return alive

    @property
    def _processes(self) -> list[Running]:
        return [self._process, *([self._watcher] if self._watcher is not None else [])]

    def _ended(self, kind: type[EngineDied], text: str) -> EngineDied:
        """End the processes, once the one that computes has written where its threads are."""
        size = len(self._log.text())
        # an engine's process is a child of the watcher's
        engines = [] if self._watcher is None else [process.pid for process in processes_of(self._watcher.pid)[1:2]]
        for pid in engines or [self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, TRACE)
        give_up = time.monotonic() + _TRACE_S
        while len(self._log.text()) == size and self.alive and time.monotonic() < give_up:
            time.sleep(0.01)
        self._end()
        return self._died(kind, text)

    def _died(self, kind: type[EngineDied], text: str, call: str = "") -> EngineDied:
        """The exception: the function that was called, the engine's method that it was in, what happened."""
        words = self._log.last_words()
        noted, lasted = self._note.call()
        call = call or noted or method_in(words)
        where = f"{self._called}, in {call}" if call else self._called
        error = kind(f"{where}: {text}; last words:\n{words or '(none)'}")
        error.call, error.lasted = call, lasted
        return error

    def close(self) -> None:
        self._connection.close()
        # a call that was interrupted need not be waited for
        if self._busy:
            self._end()
        self._process.how()
        if self._watcher is not None:
            # it ends with the process that it works for, and ends the engines first
            self._watcher.how()
        self._log.close()
        self._note.close()

    def _end(self) -> None:
        for process in self._processes:
            process.end()


class ChildPool(contextlib.AbstractContextManager["ChildPool"]):
    """Children by their environment, one alive at a time: four test processes and their children fit into 16 GiB."""

    def __init__(
        self, limits: Limits = DEFAULT, big: Limits = BIG, preload: tuple[str, ...] = (), *, hosts: bool = False
    ) -> None:
        self.limits, self.big = limits, big
        self._more: dict[str, Any] = {"preload": preload, "hosts": hosts}
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
            self._child, self._kind = Child(env, limits=limits, **self._more), wanted
        return self._child

    def call_fresh(
        self, function: Callable[..., Any], /, *args: Any, env: Mapping[str, str] | None = None, **kwargs: Any
    ) -> Any:
        """One call in a process of its own, beside the child that is kept; see Child.call."""
        with Child(env, limits=self.limits, **self._more) as child:
            return child.call(function, *args, **kwargs)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def name_of(function: Callable[..., Any]) -> str:
    """`package.module:name` of a function, or of the one that a partial calls."""
    inner = getattr(function, "func", function)
    return f"{inner.__module__}:{inner.__qualname__}"


def answer_calls(descriptor: int, watched: int = -1) -> None:
    """The other end: make the calls that come over the connection. watched: that of this process's watcher."""
    if watched >= 0:
        watcher.inherit(watched)

    with noted():
        serve(Connection(descriptor), _answer)


def _answer(request: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Any:
    function, given, named = request
    try:
        return function(*given, **named)
    except SystemExit as leaving:
        # an engine may not end the process that calls it
        raise EngineRaised(f"CRASH {describe(leaving)}") from leaving
    except Exception as error:
        keep_origin(error)
        raise
    finally:
        hosted.end_soiled()


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
