"""The generator: streams of 64-bit hashes, the same on every machine.

Hash number n of a stream is splitmix64's finaliser of key + n * step (Steele, Lea, Flood 2014); the key is a SHA-256 of
the stream's name. Only integer arithmetic is used, so no machine, thread count or library version changes a bit. A
change that does change bits raises GENERATOR_VERSION, and the goldens are regenerated.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from ktverify.spec.cases import Case

GENERATOR_VERSION = 1

U64 = npt.NDArray[np.uint64]

# splitmix64's constants: odd, and known to mix all bits
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BLOCK = 1 << 13  # hashes per block: block, scratch and indices stay in the level 2 cache


def key_of(name: str) -> np.uint64:
    """The 64-bit key of the stream `name`."""
    key: np.uint64 = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    return key


def case_key(case: Case, tensor: str, expert: int | None = None) -> np.uint64:
    """The key of one tensor of a case, or of one expert's part of it."""
    place = tensor if expert is None else f"{tensor}[{expert}]"
    return key_of(f"ktverify {GENERATOR_VERSION} {case.name} {case.seed} {place}")


def _hash_block(counter: U64, key: np.uint64, out: U64, scratch: U64) -> None:
    """out = splitmix64's finaliser of (key + counter * step); counter, out, scratch [n] uint64."""
    np.multiply(counter, _STEP, out=out)
    np.add(out, key, out=out)
    np.right_shift(out, np.uint64(30), out=scratch)
    np.bitwise_xor(out, scratch, out=out)
    np.multiply(out, _MIX_1, out=out)
    np.right_shift(out, np.uint64(27), out=scratch)
    np.bitwise_xor(out, scratch, out=out)
    np.multiply(out, _MIX_2, out=out)
    np.right_shift(out, np.uint64(31), out=scratch)
    np.bitwise_xor(out, scratch, out=out)


def hashes(key: np.uint64, count: int, start: int = 0) -> U64:
    """[count] uint64: hashes number `start` and following of the stream of `key`."""
    counter = np.arange(start, start + count, dtype=np.uint64)
    out = np.empty_like(counter)
    _hash_block(counter, key, out, np.empty_like(counter))
    return out


def look_up(out: npt.NDArray[np.uint16], key: np.uint64, table: npt.NDArray[np.uint16]) -> None:
    """out [n] uint16 = table[draw]; table has 65536 entries, and each hash gives four 16-bit draws.

    Works block by block, so that a large tensor needs no second array of its size.
    """
    first = np.arange(_BLOCK, dtype=np.uint64)
    counter, hashed, scratch = np.empty_like(first), np.empty_like(first), np.empty_like(first)
    index = np.empty(4 * _BLOCK, np.intp)
    for begin in range(0, out.size, 4 * _BLOCK):
        count = min(4 * _BLOCK, out.size - begin)
        np.add(first, np.uint64(begin // 4), out=counter)
        _hash_block(counter, key, hashed, scratch)
        np.copyto(index, hashed.astype("<u8", copy=False).view("<u2"))
        # with "clip" numpy makes no checked copy; a 16-bit draw cannot be out of range
        np.take(table, index[:count], out=out[begin : begin + count], mode="clip")
