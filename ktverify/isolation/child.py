"""A Python process that calls functions for a test, so that a crash costs one test and not the run.

`Child(env)` starts it; `child.call(function, ...)` returns the function's value or raises its exception here. A child
that ends instead raises EngineDied with the signal and the last lines of its output.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from ktverify.errors import EngineDied, EngineOutOfMemory, EngineTimeout, RemoteError, Unsupported
from ktverify.isolation import locks
from ktverify.isolation.channel import exchange, serve, value_of
from ktverify.isolation.fork_server import fork_server
from ktverify.isolation.process import Log, resident_of

# several tests compute at once; torch's own threads, which spin for a processor that another test has, cost minutes
_SHARED_CPU = {"OMP_NUM_THREADS": "1"}


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
    """True for an exception from `Child.call` that was raised over there where nothing should be refused: a crash.

    A check reports what it finds wrong as an AssertionError.
    """
    if isinstance(error, RemoteError):
        return True
    return isinstance(error.__cause__, RemoteError) and not isinstance(error, AssertionError)


class Child:
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
        environment = {**os.environ, **_SHARED_CPU, locks.HELD_BY_PARENT: "1", **(env or {})}
        self._process = fork_server(preload).fork(answer_calls, there.fileno(), environment, self._log.fileno())
        there.close()

    def __enter__(self) -> Child:
        return self

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
        name = name_of(function)
        self._busy = True
        try:
            reply = exchange(self._connection, (function, args, kwargs), self._watch(name))
        except EOFError:
            raise EngineDied(f"{name}: the process {self._process.how()}{self._last_words()}") from None
        self._busy = False
        try:
            return value_of(reply)
        except NotImplementedError as error:
            raise Unsupported(str(error)) from error.__cause__

    def _watch(self, called: str) -> Callable[[], bool]:
        """False once the child has ended. Ends it where it exceeds its limits, and raises which one."""
        limits, deadline = self.limits, time.monotonic() + self.limits.time_s

        def watch() -> bool:
            used = resident_of(self._process.pid)
            if used > limits.memory:
                self._process.end()
                text = f"{called}: {used / 2**30:.1f} GiB were resident, the limit is {limits.memory / 2**30:.1f} GiB"
                raise EngineOutOfMemory(text + self._last_words())
            if not self.alive:
                return False
            if time.monotonic() > deadline:
                self._process.end()
                text = f"{called}: no answer after {limits.time_s:g} s, ended with SIGKILL"
                raise EngineTimeout(text + self._last_words())
            return True

        return watch

    def _last_words(self) -> str:
        return f"; last words:\n{self._log.last_words()}"

    def close(self) -> None:
        self._connection.close()
        # a call that was interrupted need not be waited for
        if self._busy:
            self._process.end()
        self._process.how()
        self._log.close()


class ChildPool:
    """Children by their environment, one alive at a time: four test processes and their children fit into 16 GiB."""

    def __init__(self, limits: Limits = DEFAULT, big: Limits = BIG, preload: tuple[str, ...] = ()) -> None:
        self.limits, self.big = limits, big
        self._preload = preload
        self._child: Child | None = None
        self._kind: tuple[dict[str, str], bool] = ({}, False)

    def __enter__(self) -> ChildPool:
        return self

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
    serve(Connection(descriptor), _call)


def _call(request: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Any:
    function, args, kwargs = request
    return function(*args, **kwargs)
