"""The engine's process: builds the layers of one factory and makes their calls on request, over wire.py.

It knows no case, no answer and no tolerance. The watcher forks it (watcher.py), or starts it by path under another
Python: `python layers.py LOADER SPEC DESCRIPTOR`. It imports nothing of ktverify then. LOADER, a spec of host.find, is
called with SPEC and returns the factory; "" for host.find itself.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import ctypes
import inspect
import math
import os
import signal
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

if __package__:
    from ktverify.isolation import host, regions, wire
    from ktverify.isolation.regions import Region
else:
    # run by path: these lie beside this file, and must not shadow an engine's modules of the same names
    import host  # type: ignore[import-not-found, no-redef]
    import regions  # type: ignore[import-not-found, no-redef]
    import wire  # type: ignore[import-not-found, no-redef]
    from regions import Region  # type: ignore[no-redef]

    sys.path.pop(0)
    for _name in ("host", "regions", "wire"):
        del sys.modules[_name]

PARAMETERS = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
# characters of an error's text and of its traceback
_TEXT = 100_000
# bytes of a layer's base weights up to which memory is poisoned: an engine may map more memory than it touches
_MOST_POISONED = 256 << 20


class Layers:
    """Layers of one factory by number, and the requests to them."""

    def __init__(self, factory: Any) -> None:
        self.factory = factory
        self.layers: dict[int, Any] = {}
        self.shared: dict[int, dict[str, Any]] = {}
        self.regions: dict[int, Region] = {}
        self.built = 0
        self.last_region = 0
        self.clean: dict[str, str] = {}

    # ---- values

    def given(self, header: dict[str, Any], fd: int) -> Any:
        """The value of a request; its tensors lie in a private mapping of the memory file."""
        owner: Any = (b"",)
        if fd >= 0:
            owner, address, sent = regions.mapped(fd, header["memory"])
        places: dict[int, tuple[int, int]] = {}
        for number, offset, size in header["regions"]:
            places[number] = offset, size
            if size:
                self.regions[number] = Region(address + offset, size, owner, sent + offset)

        def tensor(found: dict[str, Any]) -> Any:
            flat = wire.on_meta(found)
            if flat is not None:
                return flat
            region = places[found["region"]]
            return wire.view(owner[0], found, region[0] + found["offset"], region)

        return wire.decode(header["given"], tensor)

    def answer_of(self, value: Any) -> tuple[dict[str, Any], wire.MemoryFile]:
        """(header, memory file) of a value. Tensors in a known region are described by their place in it.

        Those that share memory lie in one new region, as they do here. The header says which arguments were written to.
        """
        new: list[tuple[int, int, Any, dict[str, Any]]] = []

        def place(tensor: Any) -> dict[str, Any] | None:
            found = wire.describe(tensor)
            if found is None or found["device"] == "meta":
                return found
            address, size = wire.span_of(tensor)
            for number, region in self.regions.items():
                if size and region.address <= address and address + size <= region.address + region.size:
                    return found | {"region": number, "offset": address - region.address}
            new.append((address, size, tensor.detach(), found))
            return found

        encoded = wire.encode(value, place)
        memory, sent = wire.MemoryFile(), []
        begin = end = number = 0
        for address, size, tensor, found in sorted(new, key=lambda each: (each[0], -each[1])):
            if not size:
                # it has no memory, and no place in any
                found |= {"region": 0, "offset": 0}
                continue
            if not number or address >= end:
                self.last_region += 1
                # the judge's own numbers are even
                number, begin, end = 2 * self.last_region + 1, address, address + size
                self.regions[number] = Region(begin, size, [])
            self.regions[number].owner.append(tensor)
            end = max(end, address + size)
            self.regions[number].size = end - begin
            found |= {"region": number, "offset": address - begin}
        for number in sorted({found["region"] for _, _, _, found in new} - {0}):
            region = self.regions[number]
            sent.append([number, memory.add(region.address, region.size), region.size])
        return {"value": encoded, "regions": sent, "written": regions.written(self.regions)}, memory

    # ---- requests

    def do_facts(self) -> dict[str, Any]:
        """What the checks have to know of the factory."""
        factory = self.factory
        isas = getattr(factory, "isas", None)
        script = getattr(factory, "stand_alone", None)
        facts: dict[str, Any] = {"isas": list(isas) if isinstance(isas, (list, tuple)) else None}
        sums = getattr(factory, "fp32_sums", None)
        facts["fp32_sums"] = None if sums is None else bool(sums)
        facts["contract"] = getattr(factory, "contract", None)
        said = getattr(factory, "capabilities", None)
        facts["capabilities"] = dict(said) if isinstance(said, Mapping) else said
        facts["file"] = getattr(sys.modules.get(getattr(factory, "__module__", "")), "__file__", None)
        facts["stand_alone"] = None if script is None else os.fspath(script)
        # a factory that is itself one of another interpreter
        spec, check = getattr(factory, "spec", None), getattr(factory, "check", None)
        facts["hosted"] = [spec, check()] if isinstance(spec, str) and callable(check) else None
        return facts

    def do_build(self, arguments: dict[str, Any]) -> list[Any]:
        self.built += 1
        regions.poison(_weights(arguments) <= _MOST_POISONED)
        layer = self.layers[self.built] = self.factory(**arguments)
        accumulates = False
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            accumulates = "accumulate" in inspect.signature(layer.backward).parameters
        return [self.built, accumulates, hasattr(layer, "set_gpu_experts_mask")]

    def do_call(self, number: int, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        layer = self.layers[number]
        result = getattr(layer, method)(*given, **named)
        if method == "init_lora_weights":
            self.shared[number] = dict(zip(PARAMETERS, given, strict=False)) | named
        if method == "backward":
            return [result, hasattr(layer, "grad_weights"), getattr(layer, "grad_weights", None)]
        return result

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

    def do_trim(self) -> None:
        """Give back to the system what the allocator keeps."""
        regions.trim()

    def do_changes(self) -> list[str]:
        """What of this process's state is not as it was when the engine had been imported."""
        now = state()
        return [name for name in now if now[name] != self.clean.get(name)]


def _weights(arguments: dict[str, Any]) -> int:
    """Bytes of the base weights of a layer in bf16; 0 where an argument is no size."""
    sizes = [arguments.get(name) for name in ("num_experts", "hidden_size", "moe_intermediate_size")]
    return 6 * math.prod(size if isinstance(size, int) else 0 for size in sizes)


# ---- state and errors


def random_state() -> bytes:
    """The state of torch's generator of random numbers."""
    import torch

    state = torch.get_rng_state()
    return bytes(wire.memory_at(state.data_ptr(), state.numel()))


def set_random_state(state: bytes) -> None:
    """The opposite of random_state."""
    import torch

    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def state() -> dict[str, str]:
    """What is global in a process and changes what other code computes: name -> value in words."""
    import torch

    found = {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.empty(0).device),
        "grad mode": str(torch.is_grad_enabled()),
        "inference mode": str(torch.is_inference_mode_enabled()),
        "threads": str(torch.get_num_threads()),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "denormals": str(float(torch.tensor(1e-40, device="cpu") * torch.tensor(1.0, device="cpu"))),
        "rounding": str(ctypes.CDLL("libm.so.6").fegetround()),
        # a module that is imported late may add filters for its own warnings
        "warnings": str(sorted({each[0] for each in warnings.filters if each[1] is None and each[2] is Warning})),
        "environment": str(sorted(os.environ.items())),
        "directory": _directory(),
        "signals": str([signal.getsignal(number) for number in sorted(signal.valid_signals())]),
        "stdout": f"{sys.stdout is sys.__stdout__} {_inode(1)} {_inode(2)}",
        "functions": str([id(getattr(torch.Tensor, name)) for name in ("__sub__", "__eq__", "copy_", "data_ptr")]),
    }
    found["modules"] = str(sorted(name for name, module in sys.modules.items() if module is None))
    mask = os.umask(0)
    os.umask(mask)
    found["umask"] = oct(mask)
    if "numpy" in sys.modules:
        found["numpy"] = str(sys.modules["numpy"].geterr())
    return found


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "gone"


def _inode(descriptor: int) -> str:
    try:
        return str(os.fstat(descriptor).st_ino)
    except OSError:
        return "closed"


def failure(error: BaseException) -> dict[str, Any]:
    """An exception in plain values: its class, the nearest builtin one, its text, where and by whom it was raised."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind]
    try:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    except Exception:
        text = "an exception without a text"
    code = error.code if isinstance(error, SystemExit) and type(error.code) in (int, str, type(None)) else 1
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    # the line that helps is one of the engine's, not of a library that it called
    libraries = tuple({f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    frames = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    return {
        "class": type(error).__name__,
        "kinds": kinds,
        "text": text[:_TEXT],
        "code": code,
        "declared": isinstance(error, NotImplementedError) and host.declared(error),
        "place": f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "",
        "trace": "".join(traceback.format_exception(type(error), error, error.__traceback__))[-_TEXT:],
    }


# ---- the process


def serve(loader: str, spec: str, connection: Connection) -> None:
    """Answer requests until the connection closes. An error of the import is the first answer."""
    served: Layers | None = None
    sent: wire.MemoryFile | None = None
    with contextlib.suppress(EOFError, OSError, wire.WireError):
        while True:
            header, fd = wire.receive(connection)
            if sent is not None:
                sent.close()
            drawn = b""
            try:
                if served is None:
                    served = Layers(_imported(loader, spec))
                    served.clean = state()
                if header.get("random"):
                    set_random_state(base64.b64decode(header["random"]))
                drawn = random_state()
                reply, sent = _answer(served, header, fd)
            except BaseException as error:
                reply, sent = {"error": failure(error)}, None
            finally:
                if fd >= 0:
                    os.close(fd)
            reply["drew"] = bool(drawn) and drawn != random_state()
            wire.send(connection, reply, sent)


def _imported(loader: str, spec: str) -> Any:
    """The factory. ImportError for what is no Exception, as pytest's skip: another process could not raise it."""
    try:
        return (host.find(loader) if loader else host.find)(spec)
    except (Exception, SystemExit):
        raise
    except BaseException as error:
        found = failure(error)
        text = f"{found['class']}: {found['text']}" if found["text"] else found["class"]
        raise ImportError(f"engine {spec!r} cannot be imported: {text} ({found['place']})") from error


def _answer(served: Layers, header: dict[str, Any], fd: int) -> tuple[dict[str, Any], wire.MemoryFile]:
    regions.fill(served.regions, header["fill"], fd)
    for number in header["dropped"]:
        served.layers.pop(number, None)
        served.shared.pop(number, None)
    for number in header["forgotten"]:
        served.regions.pop(number, None)
    if header["do"] == "contents":
        return regions.contents(served.regions, header["numbers"])
    given = served.given(header, fd)
    return served.answer_of(getattr(served, f"do_{header['do']}")(*given))


def main(loader: str, spec: str, descriptor: int) -> None:
    """Serve, as the last thing that this process does."""
    import faulthandler

    faulthandler.enable()
    # Ctrl-C is for the judge, which ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.argv[:] = ["engine"]
    try:
        serve(loader, spec, Connection(descriptor))
    finally:
        # nothing that an engine registered runs at the end
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
