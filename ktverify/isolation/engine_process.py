"""A judge's end of an engine's process: requests and answers, and what both ends know of each other's memory.

hosted.py has the factory and the layers that use it, layers.py is the other end.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import math
import os
import threading
import time
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from ktverify.errors import EngineDied, EngineTimeout, GateFailed, NotDeclared, RemoteError
from ktverify.isolation import wire
from ktverify.isolation.calls import CALLS, IMPORT, call_of
from ktverify.isolation.layers import random_state
from ktverify.isolation.origin import set_origin
from ktverify.isolation.process import how_it_ended, last_words
from ktverify.isolation.watcher import Watcher

_POLL_S = 0.05
# seconds that an import may take at least: a call's limit is about computing
_IMPORT_S = 30.0
_TAIL = 1 << 14

# classes of exceptions that are raised here as the engine raised them: those that take one text
_KINDS: dict[str, type[Exception]] = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError)
    if kind.__name__ == name and not issubclass(kind, getattr(builtins, "BaseExceptionGroup", ()))
}


class _Limit:
    """seconds: the longest that one call may take; None for no limit."""

    seconds: float | None = None


limit = _Limit()


class Host:
    """An engine's process, and what it and this one know of each other's memory. For several threads."""

    def __init__(self, own: Watcher, loader: str, spec: str, python: str) -> None:
        self._watcher = own
        self._since = _written()
        self._connection, self.pid = own.start(loader, spec, python)
        self._lock = threading.RLock()
        self.layers = 0
        self.died = ""
        self.dropped: list[int] = []
        self._forgotten: list[int] = []
        self._numbers = 0
        self._random = b""
        self._drew = False
        # arguments and results by the numbers of their regions: arguments as (tensor, address of the region, size);
        # names: what the contract calls them
        self._given: dict[int, tuple[weakref.ref[Any], int, int]] = {}
        self._names: dict[int, str] = {}
        self._number_of: dict[int, int] = {}
        self._results: dict[int, weakref.ref[Any]] = {}

    def ask(
        self,
        do: str,
        what: str,
        *given: Any,
        fill: dict[int, tuple[int, int]] | None = None,
        names: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> Any:
        """The answer to a request. Raises the engine's exception, EngineDied or EngineTimeout, and GateFailed where it
        wrote into an argument of this call or an earlier one.

        what: the name of the call in an error. fill: regions that get new bytes first: number -> (address, size).
        names: arguments by the names that an error has for them.
        """
        with self._lock, contextlib.closing(wire.MemoryFile()) as memory:
            regions: list[list[int]] = []
            header = {"do": do, "given": wire.encode(given, lambda tensor: self._place(tensor, memory, regions))}
            _refuse_unknown(header["given"])
            header["regions"] = regions
            header["fill"] = [[n, memory.add(address, size), size] for n, (address, size) in (fill or {}).items()]
            with self._random_numbers(header):
                answer, arrays = self._exchange(header, memory, what)
            for name, tensor in names.items():
                if (number := self._number_of.get(id(tensor))) is not None:
                    self._names[number] = name
            self._expect_unwritten(answer.get("written"), what)
            return wire.decode(answer.get("value"), lambda found: self._arrived(found, arrays))

    def _expect_unwritten(self, numbers: Any, what: str) -> None:
        """GateFailed that names the arguments of these regions, where there are any."""
        if type(numbers) is list and (found := {self._names.get(wire.whole(each), "an argument") for each in numbers}):
            text = (
                f"FAIL {what} wrote into, or beside, {', '.join(sorted(found))}: inputs and parameters are not changed"
            )
            raise GateFailed(text, (("written", math.inf),))

    @contextlib.contextmanager
    def _random_numbers(self, header: dict[str, Any]) -> Iterator[None]:
        """Let the engine's generator of random numbers follow this process's: what torch.manual_seed does reaches it.

        Where a call took random numbers both have gone on, each by itself, so that the same seed again is seen as new.
        """
        import torch

        state = random_state()
        header["random"] = base64.b64encode(state).decode() if state != self._random else ""
        self._drew = False
        try:
            yield
        finally:
            if self._drew:
                torch.empty((), dtype=torch.int64, device="cpu").random_()
                state = random_state()
            self._random = state

    def _exchange(
        self, header: dict[str, Any], memory: wire.MemoryFile, what: str
    ) -> tuple[dict[str, Any], dict[int, Any]]:
        """The engine's answer and its new regions."""
        if self.died:
            raise EngineDied.of(what, f"the engine's process is gone: {self.died}")
        dropped, forgotten = self.dropped[:], self._forgotten[:]
        try:
            wire.send(self._connection, {**header, "dropped": dropped, "forgotten": forgotten}, memory)
            # also where the caller does not say which call it makes
            with call_of(what) if what in CALLS else contextlib.nullcontext():
                self._wait(what)
            answer, fd = wire.receive(self._connection)
        except (EOFError, OSError):
            raise self._ended(what) from None
        except wire.WireError as error:
            self.end(f"sent {error}")
            raise EngineDied.of(what, f"the process {self.died}") from None
        try:
            self._drew = answer.get("drew") is True
            if "error" in answer:
                raise _raised(answer["error"], what)
            arrays = self._read(answer, fd)
        except wire.WireError as error:
            self.end(f"sent {error}")
            raise EngineDied.of(what, f"the process {self.died}") from None
        finally:
            if fd >= 0:
                os.close(fd)
            del self.dropped[: len(dropped)], self._forgotten[: len(forgotten)]
            self.layers -= len(dropped)
        return answer, arrays

    def _wait(self, what: str) -> None:
        """Return when there is an answer. EOFError where the process has ended; EngineTimeout at the limit."""
        seconds = limit.seconds
        if seconds is not None and what == IMPORT:
            seconds = max(seconds, _IMPORT_S)
        deadline = time.monotonic() + seconds if seconds is not None else None
        while not self._connection.poll(_POLL_S):
            if self._watcher.poll(self.pid) is not None and not self._connection.poll():
                raise EOFError
            if deadline is not None and time.monotonic() > deadline:
                self.end(f"gave no answer for {seconds:g} s", show=True)
                raise EngineTimeout.of(what, f"no answer after {seconds:g} s")

    def _ended(self, what: str) -> EngineDied:
        code = self._watcher.wait(self.pid)
        self.died = how_it_ended(code) if code is not None else "closed its pipe and lived on"
        self.end(self.died)
        return EngineDied.of(what, f"the process {self.died}", _last_words(self._since))

    def end(self, why: str, *, show: bool = False) -> None:
        """End the process and all that it started. show: it first writes where its threads are."""
        self.died = self.died or why
        self._watcher.end(self.pid, show)
        self._connection.close()

    # ---- tensors

    def _place(self, tensor: Any, memory: wire.MemoryFile, regions: list[list[int]]) -> dict[str, Any] | None:
        """The description of an argument, which gets a new region."""
        found = wire.describe(tensor)
        if found is None or found["device"] == "meta":
            return found
        begin, size = wire.span_of(tensor)
        if not size:
            return found | {"region": 0, "offset": 0, **_no_region(regions)}
        address, wide = wire.region_of(tensor)
        self._numbers += 2
        number = self._numbers
        # the same tensor again: its old region is no longer where it lies
        if (old := self._number_of.get(id(tensor))) is not None:
            self._forget(old)
        key = id(tensor)
        self._given[number] = (weakref.ref(tensor, lambda _: self._gone(key, number)), address, wide)
        self._number_of[key] = number
        regions.append([number, memory.add(address, wide), wide])
        return found | {"region": number, "offset": begin - address}

    def _gone(self, key: int, number: int) -> None:
        if self._number_of.get(key) == number:
            del self._number_of[key]
        self._forget(number)

    def _forget(self, number: int) -> None:
        if self._given.pop(number, None) is not None:
            self._names.pop(number, None)
            self._forgotten.append(number)

    def number_of(self, tensor: Any) -> int | None:
        """The number of the region that a tensor was sent in; None where it lies elsewhere by now."""
        number = self._number_of.get(id(tensor))
        return number if number is not None and self._given[number][1:] == wire.region_of(tensor) else None

    def _read(self, answer: dict[str, Any], fd: int) -> dict[int, Any]:
        """The new regions of an answer, each an array of bytes here."""
        import numpy as np

        arrays: dict[int, Any] = {}
        if type(answer.get("regions")) is not list:
            raise wire.WireError("no regions")
        for each in answer["regions"]:
            if type(each) is not list or len(each) != 3:
                raise wire.WireError("no region")
            number, offset, size = (wire.whole(part) for part in each)
            if offset + size > answer["memory"]:
                raise wire.WireError("a region outside of its memory")
            # the place in 64 bytes, as over there
            whole = np.zeros(size + wire.ALIGNMENT, np.uint8)
            start = (offset - whole.ctypes.data) % wire.ALIGNMENT
            array = arrays[number] = whole[start : start + size]
            if size:
                wire.read_into(fd, offset, wire.memory_at(array.ctypes.data, size))
        return arrays

    def _arrived(self, found: dict[str, Any], arrays: dict[int, Any]) -> Any:
        """The tensor of a description: in a new region, in an argument's memory or in that of an earlier result."""
        import torch

        flat = wire.on_meta(found)
        if flat is not None:
            return flat
        size, number, offset = wire.checked(found), wire.whole(found.get("region")), wire.whole(found.get("offset"))
        if not size:
            return wire.view(b"", found, 0)
        if number in arrays:
            if number not in self._results or self._results[number]() is None:
                array = arrays[number]
                self._results[number] = weakref.ref(array, lambda _: self._result_gone(number))
            return wire.view(arrays[number], found, offset)
        result = self._results.get(number)
        if result is not None and (array := result()) is not None:
            return wire.view(array, found, offset)
        given = self._given.get(number)
        owner = given[0]() if given is not None else None
        if given is None or owner is None or offset + size > given[2]:
            raise wire.WireError("a tensor in no memory that is known")
        # in the argument itself, whose bytes are not changed by that
        bytes_of = torch.empty(0, dtype=torch.uint8, device="cpu").set_(owner.detach().untyped_storage())
        start = given[1] + offset - bytes_of.data_ptr()
        dtype = getattr(torch, found["dtype"])
        if start % dtype.itemsize:
            raise wire.WireError("a tensor between two elements")
        return bytes_of[start : start + size].view(dtype).as_strided(found["shape"], found["stride"])

    def _result_gone(self, number: int) -> None:
        self._results.pop(number, None)
        self._forgotten.append(number)

    # ---- what is written

    def contents(self) -> None:
        """Copy what the engine has in the regions of living arguments and results into their memory here."""
        with self._lock, contextlib.closing(wire.MemoryFile()) as nothing:
            places: dict[int, tuple[int, int]] = {n: (address, size) for n, (_, address, size) in self._given.items()}
            places |= self._places_of_results()
            header = {"do": "contents", "given": None, "numbers": sorted(places), "regions": [], "fill": []}
            _, arrays = self._exchange(header, nothing, "contents")
            for number, array in arrays.items():
                address, size = places.get(number, (0, 0))
                if size != len(array):
                    continue
                here = wire.memory_at(address, size)
                if here != memoryview(array):
                    here[:] = memoryview(array)

    def _places_of_results(self) -> dict[int, tuple[int, int]]:
        living = {number: array() for number, array in self._results.items()}
        return {n: (array.ctypes.data, len(array)) for n, array in living.items() if array is not None}

    def hand_over(self) -> None:
        """Copy what the caller wrote into living results into the engine's memory."""
        self.ask("changes", "contents", fill=self._places_of_results())

    def changes(self) -> list[str]:
        """What of its global state the engine has changed."""
        found: list[str] = self.ask("changes", "state")
        return found

    @property
    def idle(self) -> bool:
        return bool(self.died) or self.layers <= len(self.dropped)


def _no_region(regions: list[list[int]]) -> dict[str, Any]:
    """An empty tensor's place: region 0."""
    if [0, 0, 0] not in regions:
        regions.append([0, 0, 0])
    return {}


def _refuse_unknown(encoded: Any) -> None:
    """WireError where a value that is to be sent contains what the wire does not know."""
    if isinstance(encoded, dict):
        if "other" in encoded:
            raise wire.WireError(f"a {encoded['other']} cannot be sent to the engine's process")
        for each in encoded.values():
            _refuse_unknown(each)
    elif isinstance(encoded, list):
        for each in encoded:
            _refuse_unknown(each)


def _raised(error: Any, what: str) -> BaseException:
    """The exception of a description: the same builtin class and text; a class derived from one, where it was so."""
    try:
        name, text, place, trace = (str(error[key]) for key in ("class", "text", "place", "trace"))
        kinds = [kind for kind in error["kinds"] if kind in _KINDS or kind == "SystemExit"]
        found: BaseException
        if kinds[:1] == ["SystemExit"]:
            found = SystemExit(error["code"] if type(error["code"]) in (int, str) else None)
        elif "NotImplementedError" in kinds and error["declared"] is not True:
            found = NotDeclared(f"{name}: {text}")
        elif not kinds:
            found = RemoteError(f"{name}: {text}" if text else name)
        else:
            kind = _KINDS[kinds[0]]
            found = (kind if kinds[0] == name else type(wire.unknown(name).__class__.__name__, (kind,), {}))(text)
        set_origin(found, what, place)
        found.__cause__ = RemoteError(trace)
        return found
    except (KeyError, TypeError):
        raise wire.WireError("no exception") from None


def _written() -> int:
    """Bytes in this process's stderr, 0 where it is no file."""
    try:
        return os.fstat(2).st_size
    except OSError:
        return 0


def _last_words(since: int) -> str:
    """The last lines of this process's stderr where that is a file, which the engine writes to as well."""
    begin = max(since, _written() - _TAIL)
    if not _written():
        return ""
    try:
        # again, because a shell opens it for writing alone
        with open("/proc/self/fd/2", "rb") as stream:
            return last_words(os.pread(stream.fileno(), _TAIL, begin))
    except OSError:
        return ""
