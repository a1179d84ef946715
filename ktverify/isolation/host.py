"""The process of a hosted engine: builds its layers and makes their calls on request.

Run by path, under any Python from 3.10 on that has torch and the engine: it imports nothing of ktverify. Requests and
answers are pickles. Tensors travel as memory: the sender copies them into a memfd, which the receiver maps and keeps as
long as one of them lives. Strides, the address modulo 64 and requires_grad are kept.
hosted.py uses `Parcel` and `unpack` for the other end. `python host.py SERVER ARGUMENT PARENT DESCRIPTOR` may
serve another class than `Layers`: SERVER is its spec, "" for Layers; it is called with the object that ARGUMENT names
and with `module_at`.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import importlib
import importlib.util
import io
import mmap
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ALIGNMENT = 64
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
PARAMETERS = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


# ---- values between processes


class Parcel:
    """A value to be sent: `description` can be pickled; its tensors are in a memory file that is open until close()."""

    def __init__(self, value: Any) -> None:
        pickler = _Pickler()
        pickler.dump(value)
        self.description: dict[str, Any] = {"value": pickler.file.getvalue()}
        self._fd = -1
        if pickler.size:
            self._fd = os.memfd_create("ktverify")
            os.ftruncate(self._fd, pickler.size)
            with _Mapped(self._fd, pickler.size) as memory:
                for span, offset, count in pickler.spans:
                    memory.tensor(span.dtype, count, offset).copy_(span)
            self.description["memory"] = [f"/proc/{os.getpid()}/fd/{self._fd}", pickler.size]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Pickler(pickle.Pickler):
    """Pickles a value with descriptions in place of its tensors, and plans where each lies in the memory file."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        self.size = 0
        self.spans: list[tuple[Any, int, int]] = []  # span [n], its offset in bytes, n
        super().__init__(self.file)

    def persistent_id(self, value: Any) -> dict[str, Any] | None:
        import torch

        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None
        found: dict[str, Any] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if value.device.type == "meta":
            return {**found, "device": "meta", "grad": False}
        if value.device.type != "cpu":
            return None
        found |= {"device": "cpu", "grad": bool(value.requires_grad)}
        if value.numel():
            # the memory from its first to its last element; a tensor of stride 0 stays as small as it is
            count = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
            span = torch.as_strided(value.detach(), (count,), (1,))
            offset = -(-self.size // ALIGNMENT) * ALIGNMENT + value.data_ptr() % ALIGNMENT
            found |= {"stride": list(value.stride()), "offset": offset, "count": count}
            self.spans.append((span, offset, count))
            self.size = offset + count * value.element_size()
        return found


class _Unpickler(pickle.Unpickler):
    """Reads what _Pickler wrote; its tensors share the memory file."""

    def __init__(self, data: bytes, memory: _Mapped | None) -> None:
        super().__init__(io.BytesIO(data))
        self.memory = memory

    def persistent_load(self, found: dict[str, Any]) -> Any:
        import torch

        dtype = getattr(torch, found["dtype"])
        if "offset" in found:
            assert self.memory is not None
            flat = self.memory.tensor(dtype, found["count"], found["offset"])
            tensor = torch.as_strided(flat, found["shape"], found["stride"])
        else:
            tensor = torch.empty(found["shape"], dtype=dtype, device=found["device"])
        return tensor.requires_grad_(found["grad"])


class _Mapped:
    """A mapped memory file; tensors in it keep it alive."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)

    def __enter__(self) -> _Mapped:
        return self

    def __exit__(self, *_: object) -> None:
        # tensors of an exception's traceback may still use it; then it is closed when they are freed
        with contextlib.suppress(BufferError):
            self._map.close()

    def tensor(self, dtype: Any, count: int, offset: int) -> Any:
        import torch

        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)


def unpack(description: dict[str, Any]) -> Any:
    """The value of a Parcel's description. The parcel must still be open; the value outlives it."""
    memory = None
    if "memory" in description:
        path, size = description["memory"]
        fd = os.open(path, os.O_RDWR)
        try:
            memory = _Mapped(fd, size)
        finally:
            os.close(fd)
    return _Unpickler(description["value"], memory).load()


# ---- the process


def end_with_parent(on: bool = True, *, parent: int = 0) -> None:
    """End this process by SIGKILL when the thread that started it ends, also by a signal; on=False: no longer.

    parent: the pid of the process that started it; where that has ended already, this one ends at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL) if on else 0)
    if parent and os.getppid() != parent:
        os._exit(1)


# ---- the engine


def find(spec: str) -> Any:
    """The object "path/to/file.py:attribute" or "package.module:attribute"; the module itself without ":attribute"."""
    place, _, attribute = spec.partition(":")
    return getattr(module_at(place), attribute) if attribute else module_at(place)


def module_at(place: str | os.PathLike[str]) -> Any:
    """The module "path/to/file.py" or "package.module", loaded once."""
    place = os.fspath(place)
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    # the whole path: two files of one name are two modules
    name = "ktverify_hosted_" + "".join(letter if letter.isalnum() else "_" for letter in str(path))
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # its ending is .py
    assert found.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class Layers:
    """Layers of one factory by number, and the requests to them."""

    def __init__(self, factory: Any, _: Any = None) -> None:
        self.factory = factory
        self.layers: dict[int, Any] = {}
        self.shared: dict[int, dict[str, Any]] = {}
        self.sent: Parcel | None = None
        self.built = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.sent is not None:
            # the receiver has mapped it by now
            self.sent.close()
        for number in request["drop"]:
            self.layers.pop(number, None)
            self.shared.pop(number, None)
        self.sent = Parcel(getattr(self, f"do_{request['do']}")(*unpack(request["given"])))
        return self.sent.description

    def do_build(self, arguments: dict[str, Any]) -> int:
        self.built += 1
        self.layers[self.built] = self.factory(**arguments)
        return self.built

    def do_call(self, number: int, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        layer = self.layers[number]
        result = getattr(layer, method)(*given, **named)
        if method == "init_lora_weights":
            self.shared[number] = dict(zip(PARAMETERS, given, strict=False)) | named
        return (result, getattr(layer, "grad_weights", None)) if method == "backward" else result

    def do_update(self, number: int, exchanged: dict[str, Any]) -> Any:
        """update_lora_weights after an optimizer's step; `exchanged`: the parameters that are new tensors."""
        layer, shared = self.layers[number], self.shared.get(number, {})
        for name, value in exchanged.items():
            setattr(layer, name, value)
        for name in shared.keys() - exchanged.keys():
            own = getattr(layer, name)
            # an engine that made parameters of its own gets the values; one that took the given ones has them
            if own.data_ptr() != shared[name].data_ptr():
                own.detach().copy_(shared[name].detach())
        return layer.update_lora_weights()

    def do_attribute(self, number: int, name: str) -> Any:
        return getattr(self.layers[number], name)


def failure(error: BaseException) -> dict[str, Any]:
    """An exception in builtin values: the name of its class, that of its nearest builtin class, and its text."""
    builtin = next(kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return {"class": type(error).__name__, "builtin": builtin, "text": text}


def serve(server: str, argument: str, connection: Connection) -> None:
    """Answer requests until the connection closes. An error of an import is the first answer."""
    served: Any = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = connection.recv()
            try:
                served = served or (find(server) if server else Layers)(find(argument), module_at)
                reply = {"ok": True, "result": served.answer(request)}
            except Exception as error:
                traceback.print_exc()
                reply = {"ok": False, "error": failure(error)}
            connection.send(reply)


if __name__ == "__main__":
    import faulthandler

    faulthandler.enable()
    # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python puts the folder of this file first on the path: nothing in it may shadow an installed package
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    server, argument, parent, descriptor = sys.argv[1:]
    end_with_parent(parent != "0", parent=int(parent))
    serve(server, argument, Connection(int(descriptor)))
