"""The difference of two tensors, without a verdict.

Imports nothing of this package: these are the definitions that every table and gate uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_CHUNK = 1 << 21  # elements converted to fp64 at a time
_EPSILON = 1e-8  # so that mean_rel has a value where the expected tensor is all zero


@dataclass(frozen=True)
class Difference:
    """How far `actual` is from `expected`; no unit, but max_abs, worst_* and norm_* have the tensor's.

    rel_l2 = ||a - b|| / ||b||, mean_rel = mean |a - b| / (mean |b| + 1e-8), cosine = <a, b> / (||a|| ||b||), over all
    elements that are finite in both. Where b is all zero: rel_l2 is 0 if a is all zero too, else inf, and cosine is 1
    or 0. An empty tensor differs by nothing: rel_l2 = mean_rel = max_abs = 0, cosine = 1, worst_index = ().

    non_finite counts NaN and Inf where b is finite, missing_non_finite finite values where b is NaN or Inf.
    mismatched counts elements that are not b rounded once to a's dtype (+0 and -0 are one value); -1: not known.
    stray counts elements other than 0 in slices of the first axis in which b is all zero (idle experts, masked tokens).
    density is the share of elements other than 0 in b's other slices; nonzero their number.
    participation = (sum b^2)^2 / sum b^4: how many elements carry b's norm, and with it rel_l2; inf where not known.
    estimated: from a projection of b, see golden_sketch.py; rel_l2 is then within 10 %.
    """

    rel_l2: float
    mean_rel: float
    cosine: float
    max_abs: float
    worst_index: tuple[int, ...]
    worst_actual: float
    worst_expected: float
    non_finite: int
    norm_actual: float
    norm_expected: float
    numel: int
    estimated: bool = False
    missing_non_finite: int = 0
    mismatched: int = -1
    stray: int = 0
    nonzero: int = 0
    density: float = 0.0
    participation: float = math.inf


def relative(error: float, norm: float) -> float:
    """error / norm; for a norm of 0: 0 without an error, else inf."""
    if norm > 0:
        return error / norm
    return 0.0 if error == 0 else math.inf


def cosine_of(dot: float, norm_actual: float, norm_expected: float) -> float:
    """dot / (norm_actual norm_expected); 1 where both norms are zero, 0 where one is."""
    if norm_actual == 0 or norm_expected == 0:
        return 1.0 if norm_actual == norm_expected else 0.0
    return dot / norm_actual / norm_expected


def mean_relative(sum_error: float, sum_expected: float, numel: int) -> float:
    """mean |a - b| / (mean |b| + 1e-8) from the two sums."""
    return 0.0 if numel == 0 else (sum_error / numel) / (sum_expected / numel + _EPSILON)


def check_shapes(actual: torch.Tensor, expected: tuple[int, ...]) -> None:
    """ValueError when `actual` does not have the expected shape: nothing is broadcast."""
    if tuple(actual.shape) != tuple(expected):
        raise ValueError(f"shape is {list(actual.shape)}, expected {list(expected)}")


def compare(actual: torch.Tensor, expected: torch.Tensor) -> Difference:
    """The Difference of `actual` (any float dtype) from `expected` (any float dtype), of one shape; sums in fp64.

    ValueError when the shapes differ.
    """
    check_shapes(actual, tuple(expected.shape))
    numel = expected.numel()
    if numel == 0:
        return Difference(0.0, 0.0, 1.0, 0.0, (), 0.0, 0.0, 0, 0.0, 0.0, 0, mismatched=0)
    a_flat, b_flat = actual.detach().reshape(-1), expected.detach().reshape(-1)
    square = square_a = square_b = fourth_b = dot = sum_abs = sum_b = 0.0
    non_finite = missing = mismatched = 0
    worst, worst_at, broken_at = -1.0, 0, -1
    for begin in range(0, numel, _CHUNK):
        a_raw = a_flat[begin : begin + _CHUNK]
        a, b = a_raw.double(), b_flat[begin : begin + _CHUNK].double()
        rounded = b.to(a_raw.dtype).double()
        a_finite, b_finite = torch.isfinite(a), torch.isfinite(b)
        unequal = (a != rounded) & ~(torch.isnan(a) & torch.isnan(rounded))
        mismatched += int(unequal.sum())
        unexpected = b_finite & ~a_finite
        if bool(unexpected.any()):
            broken_at = begin + int(unexpected.nonzero()[0]) if broken_at < 0 else broken_at
            non_finite += int(unexpected.sum())
        missing += int((a_finite & ~b_finite).sum())
        both = a_finite & b_finite
        if not bool(both.all()):
            a, b = torch.where(both, a, 0.0), torch.where(both, b, 0.0)
        error = (a - b).abs_()
        here = int(error.argmax())
        if float(error[here]) > worst:
            worst, worst_at = float(error[here]), begin + here
        sum_abs += float(error.sum())
        sum_b += float(b.abs().sum())
        square += float(error @ error)
        square_a += float(a @ a)
        square_b += float(b @ b)
        fourth_b += float((b * b) @ (b * b))
        dot += float(a @ b)
    at = broken_at if broken_at >= 0 else worst_at
    norm_a, norm_b = math.sqrt(square_a), math.sqrt(square_b)
    stray, nonzero, density = _occupancy(actual, expected)
    return Difference(
        rel_l2=relative(math.sqrt(square), norm_b),
        mean_rel=mean_relative(sum_abs, sum_b, numel),
        cosine=cosine_of(dot, norm_a, norm_b),
        max_abs=worst,
        worst_index=unravel(at, tuple(expected.shape)),
        worst_actual=float(a_flat[at]),
        worst_expected=float(b_flat[at]),
        non_finite=non_finite,
        norm_actual=norm_a,
        norm_expected=norm_b,
        numel=numel,
        missing_non_finite=missing,
        mismatched=mismatched,
        stray=stray,
        nonzero=nonzero,
        density=density,
        participation=square_b**2 / fourth_b if fourth_b > 0 else math.inf,
    )


def count_nonzero(tensor: torch.Tensor) -> int:
    """Number of elements of a CPU tensor (any shape, float) that are not 0; -0 is 0, NaN is not.

    With numpy, in this thread: torch wakes its threads for every slice, which costs more than counting.
    """
    dense = tensor.detach().contiguous().reshape(-1)
    bits: Any = (dense.view(torch.int16) if dense.dtype == torch.bfloat16 else dense).numpy()
    if not bits.any():
        return 0
    return int(np.count_nonzero(bits & 0x7FFF if dense.dtype == torch.bfloat16 else bits))


def unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of element number `flat`, in row-major order, of a tensor of `shape`."""
    index: list[int] = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return tuple(reversed(index))


def _occupancy(actual: torch.Tensor, expected: torch.Tensor) -> tuple[int, int, float]:
    """(stray, nonzero, density) as Difference defines them."""
    if expected.dim() == 0:
        return 0, int(expected != 0), float(expected != 0)
    stray = nonzero = live = 0
    for a, b in zip(actual, expected, strict=True):
        count = count_nonzero(b)
        nonzero += count
        if count:
            live += b.numel()
        else:
            stray += count_nonzero(a)
    return stray, nonzero, nonzero / live if live else 0.0
