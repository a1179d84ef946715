"""Inputs of a case: the same bits on every machine.

Comes in: a `Case`. Goes out: `Inputs`. Every element is a function of (generator version, case name, seed, tensor name,
expert, index): a 64-bit hash of a counter, cut into 16-bit draws, looked up in a table of quantiles. Only integer
arithmetic and single IEEE-754 operations are used, never libm, so no machine, thread count or library version changes a
bit. A change that does change bits raises GENERATOR_VERSION, and the goldens are made anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ktverify.spec.cases import Case, broken_token
from ktverify.spec.names import LORA_NAMES, lora_shapes

GENERATOR_VERSION = 1

U64 = npt.NDArray[np.uint64]
Array = npt.NDArray[Any]

# splitmix64's constants: odd, and known to mix all bits
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BLOCK = 1 << 13  # hashes per block: block, scratch and indices stay in the level 2 cache

# Irwin-Hall: the sum of 8 uniform bytes, in units of 1 / 1024; its standard deviation is sqrt(8 (256^2 - 1) / 12) units
_QUANTILE_UNIT = 1024
_DEVIATION = 214038  # round(1024 * 209.0215...)

# |LoRA part| / |base part| of gate, up and down: a wrong LoRA scale then stands far above every budget
_LORA_SHARE = Fraction(2, 5)
_STRONG_LORA_SHARE = Fraction(4)
# integer data: gates are multiples of 64, so sigmoid is exactly 1 (e^-64 < 2^-53) or exactly 0 (e^896 overflows) in
# fp32 and in fp64 alike
_GATE_UNIT = 64
_GATE_ON, _GATE_OFF = 3, -16
_UP_NONZEROS, _DOWN_NONZEROS, _LORA_A_NONZEROS, _GRAD_NONZEROS = 6, 4, 2, 4


@dataclass
class Inputs:
    """What one case feeds a layer. Sizes as in Case; base weights are in logical order.

    hidden_states, grad_output [T, H] bf16; expert_ids [T, k] int64; weights [T, k] fp32; gate_proj, up_proj [E, I, H]
    and down_proj [E, H, I] bf16, zero (and never touched, so they cost no memory) for experts that no token reaches;
    lora: the six LoRA tensors by LORA_NAMES, of every expert; physical_map [E] int64: slot p holds logical expert
    physical_map[p]; active: the logical experts that some token reaches, ascending.
    """

    case: Case
    hidden_states: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    grad_output: torch.Tensor
    gate_proj: torch.Tensor
    up_proj: torch.Tensor
    down_proj: torch.Tensor
    lora: dict[str, torch.Tensor]
    physical_map: torch.Tensor
    active: list[int]

    def slotted(self, name: str) -> torch.Tensor:
        """Base weights `name` in the order of the physical slots, as load_weights_from_tensors takes them.

        [E, ...] bf16; the tensor itself where the map is the identity, a copy otherwise.
        """
        tensor: torch.Tensor = getattr(self, name)
        identity = torch.arange(self.case.num_experts)
        return tensor if torch.equal(self.physical_map, identity) else tensor[self.physical_map].contiguous()


def make_inputs(case: Case) -> Inputs:
    """Inputs of `case`; see Inputs for shapes and dtypes. Takes about 2 ns an element; idle experts take nothing."""
    expert_ids = _routing(case)
    active = sorted(set(expert_ids[expert_ids >= 0].tolist()))
    draw = _Integer(case) if case.exact else _Gaussian(case)
    e, h, i = case.num_experts, case.hidden, case.intermediate
    base = {
        "gate_proj": _lazy_zeros((e, i, h)),
        "up_proj": _lazy_zeros((e, i, h)),
        "down_proj": _lazy_zeros((e, h, i)),
    }
    lora_dtype = np.dtype(np.uint16 if case.lora_dtype == "bfloat16" else np.float32)
    lora = {
        name: np.zeros(shape, lora_dtype)
        for name, shape in lora_shapes(e, case.hidden, case.intermediate, case.rank).items()
    }
    hidden_states = np.zeros((case.qlen, h), np.uint16)
    grad_output = np.zeros((case.qlen, h), np.uint16)

    tasks: list[Callable[[], None]] = [
        functools.partial(draw.base, name, expert, array[expert]) for expert in active for name, array in base.items()
    ]
    tasks += [functools.partial(draw.lora, name, array) for name, array in lora.items()]
    tasks += [functools.partial(draw.tokens, "hidden_states", hidden_states)]
    tasks += [functools.partial(draw.tokens, "grad_output", grad_output)]
    _run_all(tasks)

    token = broken_token(case)
    if token is not None:
        column = int(_hashes(_key(case, "broken"), 1)[0] % np.uint64(h))
        hidden_states[token, column] = 0x7FC0 if case.data == "nan_row" else 0x7F80
    return Inputs(
        case=case,
        hidden_states=_as_torch(hidden_states),
        expert_ids=torch.from_numpy(expert_ids),
        weights=torch.from_numpy(draw.weights()),
        grad_output=_as_torch(grad_output),
        gate_proj=_as_torch(base["gate_proj"]),
        up_proj=_as_torch(base["up_proj"]),
        down_proj=_as_torch(base["down_proj"]),
        lora={name: _as_torch(lora[name]) for name in LORA_NAMES},
        physical_map=torch.from_numpy(_physical_map(case)),
        active=active,
    )


def inputs_sha256(inputs: Inputs) -> str:
    """Hexadecimal SHA-256 of all that a layer is fed: every tensor whole, of the base weights the active experts."""
    digest = hashlib.sha256()
    whole = {
        "hidden_states": inputs.hidden_states,
        "expert_ids": inputs.expert_ids,
        "weights": inputs.weights,
        "grad_output": inputs.grad_output,
        "physical_map": inputs.physical_map,
        **inputs.lora,
    }
    for name, tensor in whole.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensor = getattr(inputs, name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {inputs.active}\n".encode())
        for expert in inputs.active:
            digest.update(_bytes(tensor[expert]))
    return digest.hexdigest()


# ---------------------------------------------------------------- the hash


def _key(case: Case, tensor: str, expert: int | None = None) -> np.uint64:
    """The 64-bit key of one tensor's stream."""
    place = tensor if expert is None else f"{tensor}[{expert}]"
    text = f"ktverify {GENERATOR_VERSION} {case.name} {case.seed} {place}"
    key: np.uint64 = np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
    return key


def _hash_block(counter: U64, key: np.uint64, out: U64, scratch: U64) -> None:
    """out = splitmix64's finaliser of (key + counter * step), in place; counter, out, scratch [n] uint64."""
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


def _hashes(key: np.uint64, count: int, start: int = 0) -> U64:
    """[count] uint64: the stream of `key` from `start` on. For what is small; large tensors go block by block."""
    counter = np.arange(start, start + count, dtype=np.uint64)
    out = np.empty_like(counter)
    _hash_block(counter, key, out, np.empty_like(counter))
    return out


def _look_up(out: npt.NDArray[np.uint16], key: np.uint64, table: npt.NDArray[np.uint16]) -> None:
    """out [n] uint16 = table[draw], where table has 65536 entries and each hash gives four 16-bit draws."""
    first = np.arange(_BLOCK, dtype=np.uint64)
    counter, hashed, scratch = np.empty_like(first), np.empty_like(first), np.empty_like(first)
    index = np.empty(4 * _BLOCK, np.intp)
    for begin in range(0, out.size, 4 * _BLOCK):
        count = min(4 * _BLOCK, out.size - begin)
        np.add(first, np.uint64(begin // 4), out=counter)
        _hash_block(counter, key, hashed, scratch)
        np.copyto(index, hashed.astype("<u8", copy=False).view("<u2"))
        # "clip" spares numpy a checked copy; a 16-bit draw cannot be out of range
        np.take(table, index[:count], out=out[begin : begin + count], mode="clip")


@functools.cache
def _quantiles() -> npt.NDArray[np.int64]:
    """[65536] int64: the middle of each 1/65536 of the Irwin-Hall distribution of 8 bytes, in 1/1024 of a unit.

    Symmetric about 0, standard deviation _DEVIATION; between two sums it is interpolated, in exact integers.
    """
    counts = [1]
    for _ in range(8):
        running, wider = 0, []
        for place in range(len(counts) + 255):
            running += counts[place] if place < len(counts) else 0
            running -= counts[place - 256] if place >= 256 else 0
            wider.append(running)
        counts = wider
    low = np.zeros(65536, np.int64)
    total, cell = 0, 0
    for draw in range(65536):
        middle = (2 * draw + 1) << 47  # (draw + 1/2) / 65536 of 2^64
        while total + counts[cell] <= middle:
            total += counts[cell]
            cell += 1
        low[draw] = _QUANTILE_UNIT * (2 * cell - 2041) // 2 + _QUANTILE_UNIT * (middle - total) // counts[cell]
    upper = low[32768:]
    return np.concatenate([-upper[::-1], upper])


@functools.lru_cache(maxsize=32)
def _gaussian_table(scale: Fraction) -> npt.NDArray[np.uint16]:
    """[65536] bf16 bits: quantiles of a normal distribution with standard deviation `scale`."""
    factor = scale.numerator / (scale.denominator * _DEVIATION)  # one correctly rounded division of integers
    return _to_bf16(_quantiles() * np.float64(factor))


def _to_bf16(values: Array) -> npt.NDArray[np.uint16]:
    """bf16 bits of finite fp64 or fp32 values: to fp32, then to bf16, each to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    to_even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded: npt.NDArray[np.uint16] = ((bits + np.uint32(0x7FFF) + to_even) >> np.uint32(16)).astype(np.uint16)
    return rounded


# ---------------------------------------------------------------- kinds of data


class _Gaussian:
    """Normal data; `large`, `tiny`, `strong_lora`, `zero_b`, `nan_row` and `inf_row` are this with another scale."""

    def __init__(self, case: Case) -> None:
        self.case = case
        share = _STRONG_LORA_SHARE if case.data == "strong_lora" else _LORA_SHARE
        # (x A^T) is of order 1 an element, so s (x A^T) B^T is of order `share` when B is share / (s sqrt(r))
        root = Fraction(math.isqrt(case.rank << 20), 1 << 10)
        self.b_scale = share * case.rank / (Fraction(case.alpha) * root)

    def tokens(self, name: str, out: npt.NDArray[np.uint16]) -> None:
        scale = Fraction(self.case.magnitudes[0 if name == "hidden_states" else 1])
        _look_up(out.reshape(-1), _key(self.case, name), _gaussian_table(scale))

    def base(self, name: str, expert: int, out: npt.NDArray[np.uint16]) -> None:
        _look_up(out.reshape(-1), _key(self.case, name, expert), _gaussian_table(_fan_in(out.shape[-1])))

    def lora(self, name: str, out: Array) -> None:
        is_b = name.endswith("_b")
        if is_b and self.case.data == "zero_b":
            return
        scale = self.b_scale if is_b else _fan_in(out.shape[-1])
        key = _key(self.case, name)
        if out.dtype == np.uint16:
            _look_up(out.reshape(-1), key, _gaussian_table(scale))
            return
        # fp32: 4096 steps between two quantiles, so that all 24 bits of the significand are in use
        flat = out.reshape(-1)
        draws = _hashes(key, flat.size)
        fine = _quantiles()[draws >> np.uint64(48)] * 4096 + (draws & np.uint64(4095)).astype(np.int64) - 2048
        flat[:] = fine * np.float64(scale.numerator / (scale.denominator * _DEVIATION * 4096))

    def weights(self) -> npt.NDArray[np.float32]:
        """[T, k]: a / sum of k + 1 draws a in [2^12, 2^16), so a token's weights sum to less than 1, unequal."""
        rows, slots = self.case.qlen, self.case.top_k
        draws = _hashes(_key(self.case, "weights"), rows * (slots + 1)).reshape(rows, slots + 1)
        parts = (4096 + (draws % np.uint64(61440))).astype(np.int64)
        share: npt.NDArray[np.float32] = (parts[:, :slots] / parts.sum(axis=1, keepdims=True)).astype(np.float32)
        return share


class _Integer:
    """Sparse integers for which the whole layer is exact; `exactness.prove` checks it, tensor by tensor.

    hidden_states is in {-1, 0, 1} with one column of ones. A gate is 64 (c + v): c is 3 (open) or -16 (shut), v in
    [-2, 2] comes from one base and one LoRA entry, so silu(g) is g or 0. Up is an integer of at most 8, and
    grad_output has 4 entries of +-1 a token, so every operand that an engine rounds to bf16 has at most 8 bits.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.ones = int(_hashes(_key(case, "ones"), 1)[0] % np.uint64(case.hidden))

    def tokens(self, name: str, out: npt.NDArray[np.uint16]) -> None:
        key = _key(self.case, name)
        values = np.zeros(out.shape)
        if name == "hidden_states":
            values[:] = (_hashes(key, out.size) % np.uint64(3)).astype(np.float64).reshape(out.shape) - 1
            values[:, self.ones] = 1
        else:
            _scatter(values, key, _GRAD_NONZEROS)
        out[:] = _to_bf16(values)

    def base(self, name: str, expert: int, out: npt.NDArray[np.uint16]) -> None:
        key = _key(self.case, name, expert)
        values = np.zeros(out.shape)
        if name == "gate_proj":
            rows, hidden = out.shape
            draws = _hashes(key, rows)
            if hidden > 1:
                # each row one entry beside the column of ones; row by row the entries walk over all columns
                away = (draws[0] + np.arange(rows, dtype=np.uint64)) % np.uint64(hidden - 1)
                column = (self.ones + 1 + away.astype(np.int64)) % hidden
                values[np.arange(rows), column] = np.where(draws >> np.uint64(63), _GATE_UNIT, -_GATE_UNIT)
            is_open = (draws >> np.uint64(32)) % np.uint64(4) != 0
            values[:, self.ones] = _GATE_UNIT * np.where(is_open, _GATE_ON, _GATE_OFF)
        else:
            _scatter(values, key, _UP_NONZEROS if name == "up_proj" else _DOWN_NONZEROS)
        out[:] = _to_bf16(values)

    def lora(self, name: str, out: Array) -> None:
        key = _key(self.case, name)
        values = np.zeros(out.shape)
        flat = values.reshape(-1, out.shape[-1])
        if name.endswith("_a"):
            _scatter(flat, key, 1 if name == "gate_lora_a" else _LORA_A_NONZEROS)
        else:
            _scatter(flat, key, 1)
            # s B is a whole number, and for gate a multiple of the gates' unit
            values *= (_GATE_UNIT if name == "gate_lora_b" else 1) / self.case.scaling
        out[:] = _to_bf16(values) if out.dtype == np.uint16 else values

    def weights(self) -> npt.NDArray[np.float32]:
        """[T, k]: 1, 1/4 or 1/64: far enough apart that sums over slots and tokens take more bits than bf16 has."""
        shape = (self.case.qlen, self.case.top_k)
        draws = _hashes(_key(self.case, "weights"), shape[0] * shape[1]) % np.uint64(3)
        power: npt.NDArray[np.float32] = np.array([1, 0.25, 1 / 64], np.float32)[draws.astype(np.intp)].reshape(shape)
        return power


def _scatter(values: Array, key: np.uint64, per_row: int) -> None:
    """values [n, m]: per_row entries of +-1 in each row (fewer where two fall together), the rest as it was."""
    rows, columns = values.shape
    draws = _hashes(key, rows * per_row).reshape(rows, per_row)
    place = (draws % np.uint64(columns)).astype(np.int64)
    sign = np.where(draws >> np.uint64(63), 1.0, -1.0)
    values[np.arange(rows)[:, None], place] = sign


def _fan_in(columns: int) -> Fraction:
    return Fraction(1, math.isqrt(columns))


# ---------------------------------------------------------------- routing


def _routing(case: Case) -> npt.NDArray[np.int64]:
    """expert_ids [T, k] int64."""
    rows, slots, experts = case.qlen, case.top_k, case.num_experts
    key = _key(case, "routing")
    if case.routing == "zipf":
        ids = _zipf(case, key)
    else:
        # the order of E hashes per token is a random permutation; its first k entries are the experts
        draws = _hashes(key, rows * experts).reshape(rows, experts)
        ids = np.argsort(draws, axis=1, kind="stable")[:, :slots].astype(np.int64)
    if case.routing == "one_expert" and rows:
        chosen = ids[0, 0]
        taken = ids == chosen
        # where the chosen expert already is in another slot, that slot takes what slot 0 had
        ids = np.where(taken, ids[:, :1], ids)
        ids[:, 0] = chosen
    elif case.routing == "duplicate":
        ids[:, 1] = ids[:, 0]
    elif case.routing == "masked":
        keep = ids.copy()
        ids[_hashes(_key(case, "mask"), rows * slots).reshape(rows, slots) % np.uint64(4) == 0] = -1
        ids[:1] = keep[:1]
        if rows > 1:
            ids[-1] = -1
    elif case.routing == "all_masked":
        ids[:] = -1
    return np.ascontiguousarray(ids)


def _zipf(case: Case, key: np.uint64) -> npt.NDArray[np.int64]:
    """expert_ids [T, k]: k draws without replacement, the expert of popularity n with weight 2^32 // n."""
    rows, slots, experts = case.qlen, case.top_k, case.num_experts
    popular = np.argsort(_hashes(_key(case, "popularity"), experts), kind="stable")
    weight = np.array([(1 << 32) // (place + 1) for place in range(experts)], np.uint64)
    draws = _hashes(key, rows * slots).reshape(rows, slots)
    ids = np.empty((rows, slots), np.int64)
    for row in range(rows):
        left = weight.copy()
        for slot in range(slots):
            threshold = np.cumsum(left)
            place = int(np.searchsorted(threshold, draws[row, slot] % threshold[-1], side="right"))
            ids[row, slot] = popular[place]
            left[place] = 0
    return ids


def _physical_map(case: Case) -> npt.NDArray[np.int64]:
    if case.physical == "identity":
        return np.arange(case.num_experts, dtype=np.int64)
    return np.argsort(_hashes(_key(case, "physical_map"), case.num_experts), kind="stable").astype(np.int64)


# ---------------------------------------------------------------- memory and threads


def _lazy_zeros(shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """Zeros of bf16 width that take memory only where they are written, and no promise of memory at all.

    256 experts of DeepSeek-V3 are 22.5 GB; four tokens reach 26 of them at most.
    """
    count = math.prod(shape)
    # MAP_NORESERVE has a name only in newer Pythons
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    try:
        pages = mmap.mmap(-1, 2 * count, flags=flags)
    except OSError as error:
        raise MemoryError(f"no address space for {2 * count / 1e9:.1f} GB of base weights: {error}") from error
    with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages is only slower
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint16, count).reshape(shape)


def _run_all(tasks: Iterable[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(max_workers=max(1, min(2, len(os.sched_getaffinity(0))))) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()


def _as_torch(array: Array) -> torch.Tensor:
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    array: Any = flat.numpy()
    return memoryview(array).cast("B") if array.size else memoryview(b"")
