"""The memory of an engine's process: the arguments that lie in it, what was written into them, and its poison.

Imports nothing of ktverify but wire.py: layers.py uses it under any Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__:
    from ktverify.isolation import wire
else:
    import wire  # type: ignore[import-not-found, no-redef]

_M_PERTURB = -6  # malloc.h
# memory that is freed has this byte and memory that is given its complement: both bf16 and fp32 of the one are 0.19,
# those of the other -24
_POISON = 0x3E
# a variable of torch: its allocator then fills new memory with NaN
_JUNK = "FLAGS_caffe2_cpu_allocator_do_junk_fill"
# proc(5), pagemap: present, in swap; a page of a file
_THERE, _OF_FILE = 0x80 | 0x40, 0x20
# the topmost byte of a page's entry -> 1 where a private mapping has a page of its own
_OWN = bytes(int(bool(top & _THERE) and not top & _OF_FILE) for top in range(256))


class Region:
    """A piece of memory that the judge knows by its number. owner: what keeps it alive.

    sent: the address of the bytes that an argument was sent with; 0 for a result.
    """

    def __init__(self, address: int, size: int, owner: Any, sent: int = 0) -> None:
        self.address, self.size, self.owner, self.sent = address, size, owner, sent


def mapped(fd: int, size: int) -> tuple[Any, int, int]:
    """(owner, address, address of the bytes that were sent) of a memory file: a private mapping, and a shared one."""
    memory = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    sent = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    places = [ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (memory, sent)]
    return (memory, sent), places[0], places[1]


def contents(regions: dict[int, Region], numbers: list[int]) -> tuple[dict[str, Any], wire.MemoryFile]:
    """The present bytes of some regions."""
    memory = wire.MemoryFile()
    found = [[n, memory.add(regions[n].address, regions[n].size), regions[n].size] for n in numbers if n in regions]
    return {"value": None, "regions": found}, memory


def fill(regions: dict[int, Region], wanted: list[list[int]], fd: int) -> None:
    """Write new bytes into regions: [number, offset in the memory file, size]."""
    for number, offset, size in wanted:
        region = regions.get(number)
        if region is not None and size == region.size:
            for address in filter(None, (region.address, region.sent)):
                wire.read_whole(fd, offset, wire.memory_at(address, size))


def written(regions: dict[int, Region]) -> list[int]:
    """The numbers of the arguments whose bytes are not those that were sent; each is named once."""
    same = ctypes.CDLL(None).memcmp
    found = []
    for number, region in regions.items():
        if region.sent and any(
            same(ctypes.c_void_p(begin), ctypes.c_void_p(begin - region.address + region.sent), ctypes.c_size_t(size))
            for begin, size in _own_pages(region.address, region.size)
        ):
            region.sent = 0
            found.append(number)
    return found


def _own_pages(address: int, size: int) -> Iterator[tuple[int, int]]:
    """(address, size) of the parts of a private mapping that may differ from its file: pages that were written to.

    All of it where the kernel does not say. So base weights of gigabytes, which nothing wrote to, cost nothing.
    """
    page, end = mmap.PAGESIZE, address + size
    first, count = address // page, -(-end // page) - address // page
    entries = b""
    with contextlib.suppress(OSError), open("/proc/self/pagemap", "rb", buffering=0) as pages:
        entries = os.pread(pages.fileno(), 8 * count, 8 * first)
    own = entries[7::8].translate(_OWN) if len(entries) == 8 * count else b"\1" * count
    at = own.find(1)
    while at >= 0:
        stop = own.find(0, at)
        stop = count if stop < 0 else stop
        begin = max(address, (first + at) * page)
        yield begin, min(end, (first + stop) * page) - begin
        at = own.find(1, stop)


def poison(on: bool) -> None:
    """From now on memory that an allocator gives contains numbers that are no right result, or whatever it contains.

    An engine that leaves a row unwritten is then wrong, and not right where the memory happened to be 0. It reaches
    malloc of glibc and torch's allocator on the CPU, but neither other allocators nor memory that an engine maps.
    """
    import torch

    # torch first: what it fills, malloc has filled already
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    with contextlib.suppress(OSError, ValueError):
        ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), _JUNK).value = on
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_PERTURB, _POISON if on else 0)


def trim() -> None:
    """Give memory that nothing uses back to the system."""
    gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
