"""A Python process that calls functions for a test, so that a crash costs one test and not the run.

`Child(env=...)` starts it; `child.call("package.module:function", **kwargs)` returns the function's value or raises
its exception here. A child that dies raises ChildCrash with the signal and the last lines it wrote.
`serve` is the other end: requests and answers are pickles over two pipes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, Any

from suites.support import locks
from suites.support.zygote import find, zygote

# several tests compute at once; torch's own threads, spinning for a processor that another test has, cost minutes
_SHARED_CPU = {"OMP_NUM_THREADS": "1"}
_LENGTH = struct.Struct("<Q")


class ChildCrash(AssertionError):
    """The child process ended or fell silent instead of answering."""


class ChildError(AssertionError):
    """The called function raised an exception that cannot travel between processes; the text of it."""


def _read_exactly(fd: int, size: int, deadline: float | None) -> bytes:
    """`size` bytes from the pipe; EOFError when it closes first, TimeoutError after `deadline` (monotonic seconds)."""
    parts: list[bytes] = []
    while size:
        if deadline is not None:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
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


def _read_message(fd: int, deadline: float | None = None) -> Any:
    (size,) = _LENGTH.unpack(_read_exactly(fd, _LENGTH.size, deadline))
    return pickle.loads(_read_exactly(fd, size, deadline))


class Child:
    """One child process that answers calls until it is closed. Not for several threads at once."""

    def __init__(self, env: Mapping[str, str] | None = None, *, timeout_s: float = 300.0) -> None:
        self.timeout_s = timeout_s
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        request_read, self._request = os.pipe()
        self._answer, answer_write = os.pipe()
        self._process = zygote().fork(
            "suites.support.child:serve",
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

    def call(self, function: str, /, **kwargs: Any) -> Any:
        """Value of `function` ("package.module:name") called in the child with `kwargs`.

        Raises what the function raised (as ChildError where that cannot be pickled), or ChildCrash.
        """
        try:
            _write_all(self._request, pickle.dumps((function, kwargs)))
            answered, value = _read_message(self._answer, time.monotonic() + self.timeout_s)
        except (EOFError, BrokenPipeError):
            raise ChildCrash(f"{function}: the process died: {self._end()}") from None
        except TimeoutError:
            self._process.kill()
            raise ChildCrash(f"{function}: no answer after {self.timeout_s:.0f} s: {self._end()}") from None
        if answered:
            return value
        error, text = value
        if isinstance(error, BaseException):
            raise error from ChildError(text)
        raise ChildError(text)

    def _end(self) -> str:
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}; last words:\n{self.last_words()}"

    def last_words(self, lines: int = 12) -> str:
        """The last lines that the child wrote to stdout or stderr."""
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), 1 << 14, max(0, size - (1 << 14)))
        return "\n".join(tail.decode(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        for fd in (self._request, self._answer):
            with contextlib.suppress(OSError):
                os.close(fd)
        try:
            self._process.wait(timeout=10)
        except TimeoutError:
            self._process.kill()
            self._process.wait()
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
            self._child, self._kind = Child(wanted[0]), wanted
        return self._child

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def call_fresh(
    function: str, /, *, env: Mapping[str, str] | None = None, timeout_s: float = 300.0, **kwargs: Any
) -> Any:
    """One call in a process of its own; see Child.call."""
    with Child(env, timeout_s=timeout_s) as child:
        return child.call(function, **kwargs)


def _function(name: str) -> Callable[..., Any]:
    is_new = name.partition(":")[0] not in sys.modules
    found = find(name)
    if is_new:
        # modules live as long as the process: a layer's release collects garbage, and need not look through them
        gc.freeze()
    return found


def _portable(error: BaseException) -> BaseException | None:
    """`error` if it survives a pickle round trip with its text, else None."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return copy if type(copy) is type(error) and str(copy) == str(error) else None


def serve(request: int, answer: int) -> None:
    """Answer the calls that come over the pipe `request` until it closes."""
    while True:
        try:
            function, kwargs = _read_message(request)
        except EOFError:
            return
        try:
            data = pickle.dumps((True, _function(function)(**kwargs)))
        except Exception as error:
            data = pickle.dumps((False, (_portable(error), traceback.format_exc())))
        _write_all(answer, data)
