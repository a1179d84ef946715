"""Requests and replies, pickled, between two processes of this package: `exchange` on one end, `serve` on the other."""

from __future__ import annotations

import contextlib
import gc
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ktverify.errors import RemoteError

# seconds between two looks of a waiting process at the one that it waits for
_WATCH_S = 0.05


def exchange(connection: Connection, request: object, watch: Callable[[], bool]) -> Any:
    """The reply to a request, for `value_of`. EOFError where the other process has ended.

    watch: called while there is no reply. False means that the process has ended: a process that it started may still
    have the other end open.
    """
    try:
        connection.send_bytes(pickle.dumps(request))
        while not connection.poll(_WATCH_S):
            if not watch() and not connection.poll():
                raise EOFError
        return pickle.loads(connection.recv_bytes())
    except OSError:
        raise EOFError from None


def serve(connection: Connection, answer: Callable[[Any], Any]) -> None:
    """Reply `answer(request)` to each request until the other end closes."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send_bytes(_reply(connection.recv_bytes(), answer))


def _reply(data: bytes, answer: Callable[[Any], Any]) -> bytes:
    loaded = len(sys.modules)
    try:
        # unpickling a function imports its module
        request = pickle.loads(data)
        if len(sys.modules) > loaded:
            # modules live as long as the process: a layer's release collects garbage, and need not look there
            gc.freeze()
        return pickle.dumps((answer(request),))
    except Exception as error:
        return pickle.dumps((portable(error), traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def value_of(reply: tuple[Any, ...]) -> Any:
    """The value in a reply. An exception in it is raised, with a RemoteError as its cause that has the traceback.

    Where the exception could not be pickled, that RemoteError is raised.
    """
    if len(reply) == 1:
        return reply[0]
    error, trace = reply
    if error is None:
        raise RemoteError(trace)
    raise error from RemoteError(trace)


def portable(error: BaseException) -> BaseException | None:
    """`error` if it survives a pickle round trip with its text, else None."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return copy if type(copy) is type(error) and str(copy) == str(error) else None
