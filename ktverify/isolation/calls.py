"""The calls of an engine's methods, for those who watch over its process or report what it raised."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

# parts of an engine's life that are no method of a layer
IMPORT, CONSTRUCTOR = "import", "constructor"
# what counts as raised by an engine: it may not end the program that calls it, so sys.exit is one more exception
ENGINE_EXCEPTIONS = (Exception, SystemExit)


class CallLog:
    """The calls made while it is open. on_call gets the name of a method when it is called, and "" when it returns.

    failed: the first method that raised an exception, "" while there is none.
    """

    def __init__(self, on_call: Callable[[str], None] = lambda method: None) -> None:
        self.on_call = on_call
        self.failed = ""

    def __enter__(self) -> CallLog:
        _open.set((*_open.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _open.set(tuple(log for log in _open.get() if log is not self))


_open: ContextVar[tuple[CallLog, ...]] = ContextVar("open call logs", default=())


@contextlib.contextmanager
def call_of(method: str) -> Iterator[None]:
    """The body is a call of `method` of an engine: every open CallLog notes it."""
    logs = _open.get()
    for log in logs:
        log.on_call(method)
    try:
        yield
    except ENGINE_EXCEPTIONS:
        for log in logs:
            log.failed = log.failed or method
        raise
    finally:
        for log in logs:
            log.on_call("")
