"""The calls of an engine's methods, for those who watch over its process or report what it raised."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

# parts of an engine's life that are no method of a layer
IMPORT, CONSTRUCTOR = "import", "constructor"
# functions of an engine -> the call that they are
METHODS = {
    "__init__": CONSTRUCTOR,
    **{
        name: name
        for name in (
            "load_weights_from_tensors", "load_weights", "init_lora_weights", "update_lora_weights", "forward_sft",
            "backward", "set_gpu_experts_mask", "clear_sft_buffer_cache",
        )
    },
}  # fmt: skip
CALLS = frozenset((IMPORT, *METHODS.values()))
# what counts as raised by an engine: it may not end the program that calls it, so sys.exit is one more exception
ENGINE_EXCEPTIONS = (Exception, SystemExit)
_RAISED_IN = "ktverify_raised_in"  # the attribute of an exception with the innermost call


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
    except ENGINE_EXCEPTIONS as error:
        for log in logs:
            log.failed = log.failed or method
        if not raised_in(error):
            setattr(error, _RAISED_IN, method)
        raise
    finally:
        for log in logs:
            log.on_call("")


def raised_in(error: BaseException) -> str:
    """The call of an engine in which an exception was raised, also one that this package raised about its result; ""
    for none."""
    return str(getattr(error, _RAISED_IN, ""))


# ---- the call that another process is in

_SIZE = 128
_NOTE = "KTVERIFY_CALL_NOTE"  # the variable that leads a process to its note


class CallNote:
    """Memory in which another process notes the engine's method that it is in; it is there also after a crash."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("ktverify-call")
        os.ftruncate(self._fd, _SIZE)

    @property
    def environment(self) -> dict[str, str]:
        """What the other process needs in its environment, for `noted`."""
        return {_NOTE: f"/proc/{os.getpid()}/fd/{self._fd}"}

    def call(self) -> tuple[str, float]:
        """The method, "" for none, and for how many seconds it has been in it."""
        since, _, method = os.pread(self._fd, _SIZE, 0).rstrip(b"\0").decode(errors="replace").partition(" ")
        return method, time.monotonic() - float(since) if method else 0.0

    def close(self) -> None:
        os.close(self._fd)


def method_in(dump: str) -> str:
    """The engine's method in a fault handler's dump of where threads are; "" where there is none."""
    functions = (line.rpartition(" in ")[2] for line in dump.splitlines() if line.startswith("  File "))
    return next((METHODS[name] for name in functions if name in METHODS), "")


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Calls of an engine in the body are written into the note of this process, if it has one."""
    path = os.environ.pop(_NOTE, "")
    if not path:
        yield
        return
    with open(path, "r+b", buffering=0) as note:

        def write(method: str) -> None:
            os.pwrite(note.fileno(), f"{time.monotonic()} {method}".encode()[:_SIZE].ljust(_SIZE, b"\0"), 0)

        with CallLog(write):
            yield
