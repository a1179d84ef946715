"""The process of a hosted engine: builds its layers and makes their calls on request.

Run by path, under any Python from 3.10 on that has torch and the engine: it imports nothing of ktverify. Requests and
answers are lines of JSON; tensors travel as memory: the sender copies them into a memfd of their own, which the
receiver maps and keeps as long as one of them lives. Strides, the address modulo 64 and requires_grad are kept.
hosted.py uses `Parcel` and `unpack` for the other end. `python host.py SERVER ARGUMENT PARENT REQUESTS ANSWERS` may
serve another class than `Layers`: SERVER is its spec, "" for Layers; it is called with the object that ARGUMENT names
and with `module_at`.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import ctypes
import importlib
import importlib.util
import json
import mmap
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ALIGNMENT = 64
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
PARAMETERS = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


# ---- values between processes


class Parcel:
    """A value to be sent: `description` is JSON; its tensors are in a memory file that is open until close()."""

    def __init__(self, value: Any) -> None:
        self._tensors: list[tuple[Any, int, int]] = []  # span [n], its offset in bytes, n
        self._size = 0
        self._fd = -1
        self.description: dict[str, Any] = {"value": self._describe(value)}
        if self._size:
            self._fd = os.memfd_create("ktverify")
            os.ftruncate(self._fd, self._size)
            with _Mapped(self._fd, self._size) as memory:
                for span, offset, count in self._tensors:
                    memory.tensor(span.dtype, count, offset).copy_(span)
            self.description["memory"] = [f"/proc/{os.getpid()}/fd/{self._fd}", self._size]
        self._tensors.clear()

    def _describe(self, value: Any) -> dict[str, Any]:
        import torch

        if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type in ("cpu", "meta"):
            return self._tensor(value)
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return {type(value).__name__: [self._describe(item) for item in value]}
        if type(value) is dict:
            return {"dict": [[self._describe(key), self._describe(item)] for key, item in value.items()]}
        if value is None or type(value) in (bool, int, float, str):
            return {"plain": value}
        return {"pickle": base64.b64encode(pickle.dumps(value)).decode("ascii")}

    def _tensor(self, tensor: Any) -> dict[str, Any]:
        import torch

        found: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if tensor.device.type == "meta":
            return {"meta": found}
        found |= {"stride": list(tensor.stride()), "grad": bool(tensor.requires_grad)}
        if tensor.numel():
            # the memory from its first to its last element; a tensor of stride 0 stays as small as it is
            count = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            span = torch.as_strided(tensor.detach(), (count,), (1,))
            start = -(-self._size // ALIGNMENT) * ALIGNMENT + tensor.data_ptr() % ALIGNMENT
            found |= {"offset": start, "count": count}
            self._tensors.append((span, start, count))
            self._size = start + count * tensor.element_size()
        return {"tensor": found}

    def opened(self) -> Any:
        """The value as the receiver gets it: its tensors share the same memory."""
        return unpack(self.description)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


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
    return _value(description["value"], memory)


def _value(described: dict[str, Any], memory: _Mapped | None) -> Any:
    import torch

    ((kind, found),) = described.items()
    if kind == "plain":
        return found
    if kind == "pickle":
        return pickle.loads(base64.b64decode(found))
    if kind == "dict":
        return {_value(key, memory): _value(item, memory) for key, item in found}
    if kind in ("list", "tuple"):
        items = [_value(item, memory) for item in found]
        return items if kind == "list" else tuple(items)
    dtype = getattr(torch, found["dtype"])
    if kind == "meta":
        return torch.empty(found["shape"], dtype=dtype, device="meta")
    if "offset" in found:
        assert memory is not None
        flat = memory.tensor(dtype, found["count"], found["offset"])
        tensor = torch.as_strided(flat, found["shape"], found["stride"])
    else:
        tensor = torch.empty(found["shape"], dtype=dtype)
    return tensor.requires_grad_(found["grad"])


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
    """An exception as JSON: the name of its class, that of its nearest builtin class, and its text."""
    builtin = next(kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return {"class": type(error).__name__, "builtin": builtin, "text": text}


def serve(server: str, argument: str, requests: int, answers: int) -> None:
    """Answer the lines of the descriptor `requests` until it closes. What cannot be imported is the first answer."""
    served: Any = None
    with os.fdopen(requests, encoding="utf-8") as lines, os.fdopen(answers, "w", encoding="utf-8") as out:
        for line in lines:
            try:
                served = served or (find(server) if server else Layers)(find(argument), module_at)
                reply = {"ok": True, "result": served.answer(json.loads(line))}
            except Exception as error:
                traceback.print_exc()
                reply = {"ok": False, "error": failure(error)}
            out.write(json.dumps(reply) + "\n")
            out.flush()


if __name__ == "__main__":
    import faulthandler

    faulthandler.enable()
    # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python puts the folder of this file first on the path: nothing in it may shadow an installed package
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    server, argument, parent, *pipes = sys.argv[1:]
    end_with_parent(parent != "0", parent=int(parent))
    serve(server, argument, *map(int, pipes))
