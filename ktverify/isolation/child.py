"""A Python process that calls functions for a test, so that a crash costs one test and not the run.

`Child(env=...)` starts it; `child.call(function, **kwargs)` returns the function's value or raises
its exception here. A child that dies raises EngineDied with the signal and the last lines it wrote.
`serve` is the other end: requests and answers are pickles over two pipes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

import psutil

from ktverify.errors import EngineDied, EngineOutOfMemory, EngineTimeout, RemoteError, Unsupported
from ktverify.isolation import locks
from ktverify.isolation.fork_server import WAIT_S, zygote
from ktverify.isolation.forked import portable
from ktverify.isolation.process import LAST_LINES, how_it_ended, last_lines

# several tests compute at once; torch's own threads, spinning for a processor that another test has, cost minutes
_SHARED_CPU = {"OMP_NUM_THREADS": "1"}
_LENGTH = struct.Struct("<Q")
# how often a waiting parent looks at its child
WATCH_S = 0.05


@dataclass(frozen=True)
class Limits:
    """What one call may take: seconds on the clock; bytes resident, of the process and all that it started."""

    time_s: float
    memory: int


# Big cases take turns, so that one of them and three others fit into 16 GiB; see ktverify/isolation/locks.py
DEFAULT, BIG = Limits(300.0, 3 << 30), Limits(900.0, 7 << 30)
_chosen: dict[str, float] = {}


def choose_limits(time_s: float | None, memory_gib: float | None) -> None:
    """Replace the limits of all calls from now on; None leaves one as it is."""
    _chosen.clear()
    _chosen.update({name: value for name, value in (("time", time_s), ("memory", memory_gib)) if value is not None})


def limits_of(*, big: bool = False) -> Limits:
    """The limits of a call, those of a big case's or those that the command line chose."""
    usual = BIG if big else DEFAULT
    memory = int(_chosen["memory"] * 2**30) if "memory" in _chosen else usual.memory
    return Limits(_chosen.get("time", usual.time_s), memory)


def raised_by_the_engine(error: BaseException) -> bool:
    """True for what `Child.call` raised that was raised over there where nothing was to be refused: a crash.

    What a check finds wrong comes from there as an AssertionError.
    """
    if isinstance(error, RemoteError):
        return True
    return isinstance(error.__cause__, RemoteError) and not isinstance(error, AssertionError)


def _read_exactly(fd: int, size: int, watch: Callable[[], None] | None) -> bytes:
    """`size` bytes from the pipe; EOFError when it closes first. `watch` is called while there is nothing to read."""
    parts: list[bytes] = []
    while size:
        while watch is not None and not select.select([fd], [], [], WATCH_S)[0]:
            watch()
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def _read_message(fd: int, watch: Callable[[], None] | None = None) -> Any:
    (size,) = _LENGTH.unpack(_read_exactly(fd, _LENGTH.size, watch))
    return pickle.loads(_read_exactly(fd, size, watch))


def processes_of(pid: int) -> list[psutil.Process]:
    """The process and all that it started, as far as they live."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident_of(pid: int) -> int:
    """Bytes in RAM of the process and all that it started; what they share counts for each."""
    total = 0
    for process in processes_of(pid):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            total += process.memory_info().rss
    return total


class Child:
    """One child process that answers calls until it is closed. Not for several threads at once."""

    def __init__(self, env: Mapping[str, str] | None = None, *, limits: Limits | None = None) -> None:
        self._busy = False
        self.limits = limits or limits_of()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        request_read, self._request = os.pipe()
        self._answer, answer_write = os.pipe()
        self._process = zygote().fork(
            "ktverify.isolation.child:serve",
            (request_read, answer_write),
            {**os.environ, **_SHARED_CPU, locks.HELD_BY_PARENT: "1", **(env or {})},
            self._log.fileno(),
        )
        os.close(request_read)
        os.close(answer_write)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return what `function` returns when the child calls it. It is pickled by reference: a function of a module.

        Raises what the function raised (as RemoteError where that cannot be pickled), or EngineDied.
        """
        self._busy = True
        try:
            _write_all(self._request, pickle.dumps((function, args, kwargs)))
            answered, value = _read_message(self._answer, self._watch(name_of(function)))
        except (EOFError, BrokenPipeError):
            raise EngineDied(
                f"{name_of(function)}: the process {self._end()}; last words:\n{self.last_words()}"
            ) from None
        self._busy = False
        if answered:
            return value
        error, text = value
        if isinstance(error, NotImplementedError):
            raise Unsupported(str(error)) from RemoteError(text)
        if isinstance(error, BaseException):
            raise error from RemoteError(text)
        raise RemoteError(text)

    def _watch(self, called: str) -> Callable[[], None]:
        """Ends the child, and what it started, once it is beyond its limits, and raises what it was beyond."""
        limits, deadline = self.limits, time.monotonic() + self.limits.time_s

        def watch() -> None:
            held = resident_of(self._process.pid)
            if held > limits.memory:
                self._kill()
                text = f"{called}: {held / 2**30:.1f} GiB were resident, the limit is {limits.memory / 2**30:.1f} GiB"
                raise EngineOutOfMemory(f"{text}; last words:\n{self.last_words()}")
            # a process that it started may hold the pipe open; an answer may have come since there was none
            if not self.alive and not select.select([self._answer], [], [], 0)[0]:
                raise EOFError
            if time.monotonic() > deadline:
                self._kill()
                text = f"{called}: no answer after {limits.time_s:g} s, ended with SIGKILL"
                raise EngineTimeout(f"{text}; last words:\n{self.last_words()}")

        return watch

    def _kill(self) -> None:
        for process in processes_of(self._process.pid)[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        with contextlib.suppress(TimeoutError):  # a process that the kernel does not let go is left
            self._process.wait(timeout=WAIT_S)

    def _end(self) -> str:
        """How a child ended that answers no more; it is ended where it has only closed its pipe."""
        try:
            return how_it_ended(self._process.wait(timeout=WAIT_S))
        except TimeoutError:
            self._kill()
            return "closed its pipe and lived on"

    def last_words(self) -> str:
        """The last lines that the child wrote to stdout or stderr."""
        return "\n".join(last_lines(self._log)[-LAST_LINES:])

    def close(self) -> None:
        for fd in (self._request, self._answer):
            with contextlib.suppress(OSError):
                os.close(fd)
        # one that computes, for nobody any more, need not be waited for
        if self._busy:
            self._kill()
        self._end()
        self._log.close()


class ChildPool:
    """Children by their environment, one alive at a time: four test processes and their children fit into 16 GiB."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._kind: tuple[dict[str, str], bool] = ({}, False)

    def __enter__(self) -> ChildPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, env: Mapping[str, str] | None = None, *, big: bool = False) -> Child:
        """A living child with this environment: the last one if it fits, else a new one in its place.

        A child for `big` cases keeps gigabytes, so no other test goes on with it.
        """
        wanted = (dict(env or {}), big)
        if self._child is None or not self._child.alive or self._kind != wanted:
            self.close()
            self._child, self._kind = Child(wanted[0], limits=limits_of(big=big)), wanted
        return self._child

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def name_of(function: Callable[..., Any]) -> str:
    """`package.module:name` of a function, or of the one that a partial calls."""
    inner = getattr(function, "func", function)
    return f"{inner.__module__}:{inner.__qualname__}"


def call_fresh(
    function: Callable[..., Any],
    /,
    *args: Any,
    env: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    **kwargs: Any,
) -> Any:
    """One call in a process of its own; see Child.call."""
    with Child(env, limits=limits) as child:
        return child.call(function, *args, **kwargs)


def serve(request: int, answer: int) -> None:
    """Answer the calls that come over the pipe `request` until it closes."""
    while True:
        loaded = len(sys.modules)
        try:
            # unpickling imports the module of the function
            function, args, kwargs = _read_message(request)
            if len(sys.modules) > loaded:
                # modules live as long as the process: a layer's release collects garbage, and need not look there
                gc.freeze()
            data = pickle.dumps((True, function(*args, **kwargs)))
        except EOFError:
            return
        except Exception as error:
            data = pickle.dumps((False, (portable(error), traceback.format_exc())))
        _write_all(answer, data)
