"""The values of a case's tensors: normal data, and integers for which the whole layer is exact.

A draw of 16 bits of a hash selects a quantile from a table. Only integer arithmetic and single IEEE-754 operations are
used, never libm, so that the bits are the same on every machine.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from ktverify.spec.cases import Case
from ktverify.spec.generator import case_key, hashes, look_up

Array = npt.NDArray[Any]

# Irwin-Hall: the sum of 8 uniform bytes, in units of 1 / 1024; its standard deviation is sqrt(8 (256^2 - 1) / 12) units
_QUANTILE_UNIT = 1024
DEVIATION = 214038  # round(1024 * 209.0215...)

# |LoRA part| / |base part| of gate, up and down: large enough that a wrong LoRA scale exceeds every budget many times
_LORA_SHARE = Fraction(2, 5)
_STRONG_LORA_SHARE = Fraction(4)
# integer data: gates are multiples of 64, so sigmoid is exactly 1 (e^-64 < 2^-53) or exactly 0 (e^896 overflows) in
# fp32 and in fp64 alike
_GATE_UNIT = 64
_GATE_ON, _GATE_OFF = 3, -16
_UP_NONZEROS, _DOWN_NONZEROS, _LORA_A_NONZEROS, _GRAD_NONZEROS = 6, 4, 2, 4


@functools.cache
def quantiles() -> npt.NDArray[np.int64]:
    """[65536] int64: the middle of each 1/65536 of the Irwin-Hall distribution of 8 bytes, in 1/1024 of a unit.

    Symmetric about 0, standard deviation DEVIATION; between two sums it is interpolated, in exact integers.
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
    factor = scale.numerator / (scale.denominator * DEVIATION)  # one correctly rounded division of integers
    return to_bf16(quantiles() * np.float64(factor))


def to_bf16(values: Array) -> npt.NDArray[np.uint16]:
    """bf16 bits of finite fp64 or fp32 values: to fp32, then to bf16, each to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    to_even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded: npt.NDArray[np.uint16] = ((bits + np.uint32(0x7FFF) + to_even) >> np.uint32(16)).astype(np.uint16)
    return rounded


class Gaussian:
    """Normal data; `large`, `tiny`, `strong_lora`, `zero_b`, `nan_row` and `inf_row` differ from it by their scale.

    The methods fill arrays of zeros; uint16 elements are the bits of bf16. tokens: hidden_states or grad_output [T, H];
    base: gate_proj, up_proj [I, H] or down_proj [H, I] of one expert; lora: one LoRA tensor, bf16 or fp32.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        share = _STRONG_LORA_SHARE if case.data == "strong_lora" else _LORA_SHARE
        # each element of x A^T is of order 1, so s (x A^T) B^T is of order `share` when B is share / (s sqrt(r))
        root = Fraction(math.isqrt(case.rank << 20), 1 << 10)
        self.b_scale = share * case.rank / (Fraction(case.alpha) * root)

    def tokens(self, name: str, out: npt.NDArray[np.uint16]) -> None:
        scale = Fraction(self.case.magnitudes[0 if name == "hidden_states" else 1])
        look_up(out.reshape(-1), case_key(self.case, name), _gaussian_table(scale))

    def base(self, name: str, expert: int, out: npt.NDArray[np.uint16]) -> None:
        look_up(out.reshape(-1), case_key(self.case, name, expert), _gaussian_table(_fan_in(out.shape[-1])))

    def lora(self, name: str, out: Array) -> None:
        is_b = name.endswith("_b")
        if is_b and self.case.data == "zero_b":
            return
        scale = self.b_scale if is_b else _fan_in(out.shape[-1])
        key = case_key(self.case, name)
        if out.dtype == np.uint16:
            look_up(out.reshape(-1), key, _gaussian_table(scale))
            return
        # fp32: 4096 steps between two quantiles, so that all 24 bits of the significand are used
        flat = out.reshape(-1)
        draws = hashes(key, flat.size)
        fine = quantiles()[draws >> np.uint64(48)] * 4096 + (draws & np.uint64(4095)).astype(np.int64) - 2048
        flat[:] = fine * np.float64(scale.numerator / (scale.denominator * DEVIATION * 4096))

    def weights(self) -> npt.NDArray[np.float32]:
        """[T, k]: a / sum of k + 1 draws a in [2^12, 2^16): a token's weights are unequal and their sum is below 1."""
        rows, slots = self.case.qlen, self.case.top_k
        draws = hashes(case_key(self.case, "weights"), rows * (slots + 1)).reshape(rows, slots + 1)
        parts = (4096 + (draws % np.uint64(61440))).astype(np.int64)
        share: npt.NDArray[np.float32] = (parts[:, :slots] / parts.sum(axis=1, keepdims=True)).astype(np.float32)
        return share


class Integer:
    """Sparse integers for which the whole layer is exact; `exactness.prove` checks it. Methods as in Gaussian.

    hidden_states is in {-1, 0, 1} with one column of ones. A gate is 64 (c + v): c is 3 (open) or -16 (shut), v in
    [-2, 2] comes from one base and one LoRA entry, so silu(g) is g or 0. Up is an integer of at most 8, and
    grad_output has 4 entries of +-1 per token, so every operand that an engine rounds to bf16 has at most 8 bits.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.ones = int(hashes(case_key(case, "ones"), 1)[0] % np.uint64(case.hidden))

    def tokens(self, name: str, out: npt.NDArray[np.uint16]) -> None:
        key = case_key(self.case, name)
        values = np.zeros(out.shape)
        if name == "hidden_states":
            values[:] = (hashes(key, out.size) % np.uint64(3)).astype(np.float64).reshape(out.shape) - 1
            values[:, self.ones] = 1
        else:
            _scatter(values, key, _GRAD_NONZEROS)
        out[:] = to_bf16(values)

    def base(self, name: str, expert: int, out: npt.NDArray[np.uint16]) -> None:
        key = case_key(self.case, name, expert)
        values = np.zeros(out.shape)
        if name == "gate_proj":
            rows, hidden = out.shape
            draws = hashes(key, rows)
            if hidden > 1:
                # each row has one entry outside the column of ones, and consecutive rows use consecutive columns
                away = (draws[0] + np.arange(rows, dtype=np.uint64)) % np.uint64(hidden - 1)
                column = (self.ones + 1 + away.astype(np.int64)) % hidden
                values[np.arange(rows), column] = np.where(draws >> np.uint64(63), _GATE_UNIT, -_GATE_UNIT)
            is_open = (draws >> np.uint64(32)) % np.uint64(4) != 0
            values[:, self.ones] = _GATE_UNIT * np.where(is_open, _GATE_ON, _GATE_OFF)
        else:
            _scatter(values, key, _UP_NONZEROS if name == "up_proj" else _DOWN_NONZEROS)
        out[:] = to_bf16(values)

    def lora(self, name: str, out: Array) -> None:
        key = case_key(self.case, name)
        values = np.zeros(out.shape)
        flat = values.reshape(-1, out.shape[-1])
        if name.endswith("_a"):
            _scatter(flat, key, 1 if name == "gate_lora_a" else _LORA_A_NONZEROS)
        else:
            _scatter(flat, key, 1)
            # s B is an integer, and for gate a multiple of the gates' unit
            values *= (_GATE_UNIT if name == "gate_lora_b" else 1) / self.case.scaling
        out[:] = to_bf16(values) if out.dtype == np.uint16 else values

    def weights(self) -> npt.NDArray[np.float32]:
        """[T, k]: 1, 1/4 or 1/64: so far apart that sums over slots and tokens need more bits than bf16 has."""
        shape = (self.case.qlen, self.case.top_k)
        draws = hashes(case_key(self.case, "weights"), shape[0] * shape[1]) % np.uint64(3)
        power: npt.NDArray[np.float32] = np.array([1, 0.25, 1 / 64], np.float32)[draws.astype(np.intp)].reshape(shape)
        return power


def _scatter(values: Array, key: np.uint64, per_row: int) -> None:
    """Write per_row entries of +-1 into each row of values [n, m]; fewer where two entries fall on one place."""
    rows, columns = values.shape
    draws = hashes(key, rows * per_row).reshape(rows, per_row)
    place = (draws % np.uint64(columns)).astype(np.int64)
    sign = np.where(draws >> np.uint64(63), 1.0, -1.0)
    values[np.arange(rows)[:, None], place] = sign


def _fan_in(columns: int) -> Fraction:
    return Fraction(1, math.isqrt(columns))
