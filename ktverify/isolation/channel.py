"""Pickled values between two processes of this package: `Channel`, and `serve` for the end that answers requests."""

from __future__ import annotations

import contextlib
import gc
import pickle
import select
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ktverify.errors import RemoteError

# seconds between two looks of a waiting process at the one that it waits for
_WATCH_S = 0.05
_LENGTH = struct.Struct("<Q")


class Channel:
    """One end of a connection for pickled values and file descriptors. EOFError once the other end is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        here, there = socket.socketpair()
        return cls(here), cls(there)

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def send(self, value: object, fds: Sequence[int] = ()) -> None:
        self.send_bytes(pickle.dumps(value), fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            # a message of its own for the descriptors, because they arrive with its first byte
            socket.send_fds(self._connection, [b"."], list(fds))
            self._connection.sendall(_LENGTH.pack(len(data)))
            self._connection.sendall(data)
        except ConnectionError:
            raise EOFError from None

    def receive(self, watch: Callable[[], bool] | None = None) -> Any:
        """The next value; watch as receive_bytes takes it."""
        return pickle.loads(self.receive_bytes(watch)[0])

    def receive_bytes(self, watch: Callable[[], bool] | None = None) -> tuple[bytes, list[int]]:
        """The next pickle, and its file descriptors.

        watch: called while there is nothing to read. False means that the other process has ended: a process that it
        started may still have the other end open.
        """
        try:
            self._await(watch)
            first, fds, _, _ = socket.recv_fds(self._connection, 1, 8)
            if not first:
                raise EOFError
            (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size, watch))
            return self._exactly(size, watch), fds
        except ConnectionError:
            raise EOFError from None

    def _readable(self, timeout: float) -> bool:
        return bool(select.select([self._connection], [], [], timeout)[0])

    def _await(self, watch: Callable[[], bool] | None) -> None:
        while watch is not None and not self._readable(_WATCH_S):
            if not watch() and not self._readable(0):
                raise EOFError

    def _exactly(self, size: int, watch: Callable[[], bool] | None) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._await(watch)
            part = self._connection.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def serve(channel: Channel, answer: Callable[[Any], Any]) -> None:
    """Send `answer(request)` for each request until the other end closes; `value_of` reads what is sent."""
    with contextlib.suppress(EOFError):
        while True:
            data, _ = channel.receive_bytes()
            channel.send_bytes(_reply(data, answer))


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
    """The value that `serve` sent. Raises the exception instead, caused by a RemoteError with its traceback there.

    An exception that cannot be pickled is raised as that RemoteError.
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
