"""Values between a judge's process and an engine's: a header in JSON, and the bytes of tensors in a memory file.

Known are None, bool, int, float, str, list, tuple, dict, dtypes and tensors; what the engine's process sends of another
kind arrives as an `Unknown`, and nothing that arrives can run code. A tensor is a description: dtype, shape, strides,
requires_grad, and its place in a region, a piece of memory that both ends know by its number. Imports nothing of
ktverify, and torch only when it is needed: layers.py uses it under any Python.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import stat
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

ALIGNMENT = 64
# bytes around a tensor, in its own storage, that are sent with it: a write beside it can be seen there
MARGIN = 4096
DTYPES = frozenset(
    (
        *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
        *("bool", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e8m0fnu"),
    )
)
_MOST_HEADER = 1 << 26
_MOST_DIMENSIONS = 16
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)


class WireError(Exception):
    """What arrived is no message, or a value cannot be sent."""


class Unknown:
    """Stands for an object of the other process that is no value of this module; its class has the object's name."""


def unknown(name: str) -> Unknown:
    """An Unknown whose class is called `name`."""
    kind: type[Unknown] = type(name if name.isidentifier() and len(name) < 80 else "object", (Unknown,), {})
    return kind()


# ---- memory


def span_of(tensor: Any) -> tuple[int, int]:
    """(address of the first byte, size in bytes up to the end of the last element) of a strided CPU tensor."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def region_of(tensor: Any) -> tuple[int, int]:
    """(address, size) of a tensor's span with up to MARGIN bytes of its storage on each side."""
    begin, size = span_of(tensor)
    storage = tensor.untyped_storage()
    first = max(storage.data_ptr(), begin - MARGIN)
    return first, min(storage.data_ptr() + storage.nbytes(), begin + size + MARGIN) - first


def memory_at(address: int, size: int) -> memoryview:
    """The bytes at an address, which the caller keeps alive."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


class MemoryFile:
    """A new memory file, into which regions are written one after the other; zeros take no memory."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ktverify", os.MFD_CLOEXEC)
        self.size = 0

    def add(self, address: int, size: int) -> int:
        """Write the bytes at `address`; returns their offset, which has the same place in ALIGNMENT."""
        offset = -(-self.size // ALIGNMENT) * ALIGNMENT + address % ALIGNMENT
        data = memory_at(address, size) if size else memoryview(b"")
        for begin in range(0, size, _CHUNK):
            part = data[begin : begin + _CHUNK]
            # base weights of idle experts are zeros that take no memory here either
            if any(part[:64]) or bytes(part) != _ZEROS[: len(part)]:
                _write(self.fd, part, offset + begin)
        self.size = offset + size
        # zeros at the end are a part of it
        os.ftruncate(self.fd, self.size)
        return offset

    def close(self) -> None:
        os.close(self.fd)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def read_into(fd: int, offset: int, data: memoryview) -> None:
    """Read a part of a memory file that another process made; holes stay what `data` has. WireError if it is short."""
    at, end = offset, offset + len(data)
    if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size < end:
        raise WireError("the memory file is shorter than it was said to be")
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            # only a hole follows
            return
        part = data[at - offset : at - offset + _CHUNK]
        count = os.preadv(fd, [part], at) if len(part) else 0
        if count == 0 and at < end:
            raise WireError("the memory file became shorter")
        at += max(count, 1)


def read_whole(fd: int, offset: int, data: memoryview) -> None:
    """As read_into, for memory that may have other bytes than 0 in the place of a hole."""
    for begin in range(0, len(data), _CHUNK):
        part = data[begin : begin + _CHUNK]
        if os.preadv(fd, [part], offset + begin) != len(part):
            raise WireError("the memory file became shorter")


# ---- messages


def send(connection: Connection, header: dict[str, Any], memory: MemoryFile | None = None) -> None:
    """Send a header of JSON values and, where it has bytes, a memory file."""
    size = memory.size if memory is not None else 0
    connection.send_bytes(json.dumps({**header, "memory": size}).encode("ascii"))
    if memory is not None and size:
        send_handle(connection, memory.fd, None)


def receive(connection: Connection) -> tuple[dict[str, Any], int]:
    """(header, descriptor of the memory file or -1). WireError where that is no message; EOFError at the end."""
    try:
        header = json.loads(connection.recv_bytes(_MOST_HEADER))
        return header, recv_handle(connection) if whole(header["memory"]) else -1
    except (ValueError, KeyError, TypeError, RecursionError, RuntimeError) as error:
        raise WireError(f"no message: {type(error).__name__}") from None


def whole(value: Any) -> int:
    """`value` if it is an int of at least 0. WireError otherwise."""
    if type(value) is not int or value < 0:
        raise WireError("a number was expected")
    return value


# ---- values


def encode(value: Any, place: Callable[[Any], dict[str, Any] | None]) -> Any:
    """A value of JSON for `value`. place: the description of a tensor, None for one that cannot be sent."""
    import torch

    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {"dict": [[encode(key, place), encode(each, place)] for key, each in dict.items(value)]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(each, place) for each in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) in (torch.Tensor, torch.nn.Parameter) and (found := place(value)) is not None:
        return {"tensor": found}
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        return {"array": place(torch.from_numpy(value))}
    if type(value) is torch.Tensor and (kind := not_its_memory(value)):
        return {"other": f"{kind}Tensor"}
    return {"other": type(value).__name__}


def decode(value: Any, tensor: Callable[[dict[str, Any]], Any]) -> Any:
    """The value of what `encode` made. tensor: the tensor of a description. WireError for anything else."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is not dict or len(value) != 1:
        raise WireError("no value")
    ((kind, content),) = value.items()
    if kind == "other" and type(content) is str:
        return unknown(content)
    if kind == "dtype" and type(content) is str and content in DTYPES:
        import torch

        return getattr(torch, content)
    if kind == "tensor" and type(content) is dict:
        return tensor(content)
    if kind == "array" and type(content) is dict:
        return tensor(content).numpy()
    if kind in ("list", "tuple") and type(content) is list:
        items = [decode(each, tensor) for each in content]
        return items if kind == "list" else tuple(items)
    if kind == "dict" and type(content) is list and all(type(each) is list and len(each) == 2 for each in content):
        keys = [each[0] for each in content]
        if all(key is None or type(key) in (bool, int, float, str) for key in keys):
            return {key: decode(each[1], tensor) for key, each in zip(keys, content, strict=True)}
    raise WireError("no value")


def describe(tensor: Any) -> dict[str, Any] | None:
    """The description of a tensor without its place; None for one that is neither strided on the CPU nor on meta, and
    for one whose values are not those in its memory."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.device.type not in ("cpu", "meta") or dtype not in DTYPES:
        return None
    if not_its_memory(tensor):
        return None
    found = {"dtype": dtype, "shape": list(tensor.shape), "stride": list(tensor.stride())}
    return found | {"device": tensor.device.type, "grad": bool(tensor.requires_grad)}


def not_its_memory(tensor: Any) -> str:
    """The key in torch's dispatcher by which a CPU tensor has other values than its memory, as "Negative" for a view of
    the negatives; "" for none."""
    import torch

    key = torch._C.DispatchKey
    plain = torch._C.DispatchKeySet(key.CPU)
    for each in (key.ADInplaceOrView, key.AutogradCPU, key.AutocastCPU):
        plain = plain.add(each)
    other = (torch._C._dispatch_keys(tensor) - plain).highestPriorityTypeId()
    return "" if tensor.device.type != "cpu" or other == key.Undefined else str(other).rpartition(".")[2]


def on_meta(found: dict[str, Any]) -> Any:
    """The tensor of a description that has no memory; None where it has."""
    import torch

    checked(found)
    if found.get("device") != "meta":
        return None
    dtype = getattr(torch, found["dtype"])
    return torch.empty_strided(found["shape"], found["stride"], dtype=dtype, device="meta")


def checked(found: dict[str, Any]) -> int:
    """How many bytes a described tensor spans. WireError where the description is none."""
    import torch

    shape, stride = found.get("shape"), found.get("stride")
    if (
        type(found.get("dtype")) is not str
        or found["dtype"] not in DTYPES
        or type(shape) is not list
        or type(stride) is not list
    ):
        raise WireError("no description of a tensor")
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS or type(found.get("grad")) is not bool:
        raise WireError("no description of a tensor")
    for number in (*shape, *stride):
        if whole(number) >= 1 << 62:
            raise WireError("a tensor of no size")
    if math.prod(shape) >= 1 << 48:
        raise WireError("a tensor of no size")
    if math.prod(shape) == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    size: int = getattr(torch, found["dtype"]).itemsize
    return int(last + 1) * size


def view(memory: Any, found: dict[str, Any], offset: int, region: tuple[int, int] | None = None) -> Any:
    """The described tensor in `memory`, an object with a buffer, from byte `offset` on. WireError if it is outside.

    region: (offset, size) of the bytes that its storage has; by default those of the tensor alone.
    """
    import torch

    dtype, size = getattr(torch, found["dtype"]), checked(found)
    if size == 0:
        tensor = torch.empty_strided(found["shape"], found["stride"], dtype=dtype, device="cpu")
    else:
        if whole(offset) + size > len(memoryview(memory).cast("B")):
            raise WireError("a tensor outside of its memory")
        begin, whole_size = region or (offset, size)
        # the storage begins at a whole element
        begin, end = begin + (offset - begin) % dtype.itemsize, begin + whole_size
        flat = torch.frombuffer(memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin)
        tensor = torch.as_strided(flat, found["shape"], found["stride"], (offset - begin) // dtype.itemsize)
    return tensor.requires_grad_() if found["grad"] and (dtype.is_floating_point or dtype.is_complex) else tensor
