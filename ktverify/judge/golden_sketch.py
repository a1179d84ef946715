"""A large tensor in a few kilobytes: enough to estimate how far another tensor is from it.

In a count sketch, each element is added with a random sign into one of 1024 sums. It is linear: sketch(a) - sketch(b) =
sketch(a - b), whose squared norm is an unbiased estimate of ||a - b||^2 with relative variance of at most 2 / 1024
(Charikar, Chen, Farach-Colton 2002): 2.2 % standard deviation of the norm for dense differences, and exact for a single
element. Slices that are all zero are left out: there only zero is right, and every element is checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ktverify.judge.metrics import Difference, check_shapes, cosine_of, count_nonzero, mean_relative, relative, unravel
from ktverify.spec.generator import hashes, key_of

SKETCH_VERSION = 1
BUCKETS = 1024
SAMPLES = 256  # uniform over the live slices; mean_rel is estimated from them
LARGEST = 32
_CHUNK = 1 << 16  # elements hashed at a time

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sketch:
    """A sketch of a tensor b of `shape`.

    buckets [1024]: the projection; slice_norms [shape[0]]: ||b[i]||, 0 where b[i] is all zero (such slices are dead);
    sample_index [256], largest_index [32]: flat indices, sample_value, largest_value: b there; norm = ||b||, sum_abs =
    sum |b|, nonzero: number of elements other than 0. seed: text that selects the signs and buckets.
    """

    shape: tuple[int, ...]
    seed: str
    buckets: F64
    slice_norms: F64
    sample_index: I64
    sample_value: F64
    largest_index: I64
    largest_value: F64
    norm: float
    sum_abs: float
    nonzero: int

    ARRAYS = ("buckets", "slice_norms", "sample_index", "sample_value", "largest_index", "largest_value")
    SCALARS = ("norm", "sum_abs", "nonzero")


def make_sketch(expected: torch.Tensor, seed: str) -> Sketch:
    """The Sketch of `expected` (any shape of one axis or more, all finite). ValueError for NaN and Inf, and for 0-d."""
    if expected.dim() == 0 or expected.numel() == 0:
        raise ValueError(f"a sketch takes a tensor with elements, got shape {list(expected.shape)}")
    size = expected[0].numel()
    norms = np.zeros(expected.shape[0])
    sum_abs, nonzero = 0.0, 0
    buckets = np.zeros(BUCKETS)
    peaks: list[tuple[float, int]] = []
    for place, part in enumerate(expected):
        count = count_nonzero(part)
        if not count:
            continue
        values = _fp64(part)
        norms[place] = math.sqrt(float(values @ values))
        if not math.isfinite(norms[place]):
            raise ValueError("a sketch takes finite values; keep a tensor with NaN or Inf whole")
        sum_abs += float(np.abs(values).sum())
        nonzero += count
        buckets += _project(values, seed, place * size)
        few = np.argsort(-np.abs(values), kind="stable")[:LARGEST]
        peaks += [(-abs(float(values[at])), place * size + int(at)) for at in few]
    live = np.flatnonzero(norms)
    flat = expected.reshape(-1)
    picked = np.zeros(0, np.int64)
    if live.size:
        draws = hashes(_key(f"{seed} samples"), SAMPLES)
        within = (draws >> np.uint64(20)) % np.uint64(size)
        picked = live[(draws % np.uint64(live.size)).astype(np.int64)] * size + within.astype(np.int64)
    largest = np.array([at for _, at in sorted(peaks)[:LARGEST]], np.int64)
    return Sketch(
        shape=tuple(expected.shape),
        seed=seed,
        buckets=buckets,
        slice_norms=norms,
        sample_index=picked,
        sample_value=_fp64(flat[torch.from_numpy(picked)]),
        largest_index=largest,
        largest_value=_fp64(flat[torch.from_numpy(largest)]),
        norm=math.sqrt(float(norms @ norms)),
        sum_abs=sum_abs,
        nonzero=nonzero,
    )


def compare_sketch(sketch: Sketch, actual: torch.Tensor) -> Difference:
    """The Difference of `actual` (any float dtype) from the sketched tensor; estimated=True.

    rel_l2 within 10 % (4.5 standard deviations), mean_rel from 256 random entries, cosine from the three norms. max_abs
    and worst_index are those of the kept entries, or of a non-finite or stray element. Non-finite elements of `actual`
    are counted and left out. ValueError when the shapes differ.
    """
    check_shapes(actual, sketch.shape)
    size = math.prod(sketch.shape[1:])
    square_actual = square_stray = 0.0
    non_finite, stray, broken_at, stray_at = 0, 0, -1, -1
    buckets = np.zeros(BUCKETS)
    for place, part in enumerate(actual.detach()):
        live = sketch.slice_norms[place] > 0
        if not live and not count_nonzero(part):
            continue
        values = _fp64(part)
        finite = np.isfinite(values)
        if not finite.all():
            non_finite += int((~finite).sum())
            broken_at = place * size + int(np.flatnonzero(~finite)[0]) if broken_at < 0 else broken_at
            values = np.where(finite, values, 0.0)
        square = float(values @ values)
        square_actual += square
        if live:
            buckets += _project(values, sketch.seed, place * size)
        else:
            square_stray += square
            stray += count_nonzero(part)
            stray_at = place * size + int(np.abs(values).argmax()) if stray_at < 0 else stray_at
    residual = buckets - sketch.buckets
    square = float(residual @ residual) + square_stray
    norm_actual = math.sqrt(square_actual)

    flat = actual.detach().reshape(-1)
    index = np.concatenate([sketch.sample_index, sketch.largest_index])
    expected = np.concatenate([sketch.sample_value, sketch.largest_value])
    kept = _fp64(flat[torch.from_numpy(index)])
    error = np.abs(np.where(np.isfinite(kept), kept, expected) - expected)
    worst = int(error.argmax()) if error.size else -1
    at, worst_expected = (int(index[worst]), float(expected[worst])) if worst >= 0 else (0, 0.0)
    if broken_at >= 0 or stray_at >= 0:
        at = broken_at if broken_at >= 0 else stray_at
        known = np.flatnonzero(index == at)
        worst_expected = float(expected[known[0]]) if known.size else (0.0 if stray_at == at else math.nan)
    live_numel = int(np.count_nonzero(sketch.slice_norms)) * size
    samples = sketch.sample_index.size
    mean_error = float(error[:samples].mean()) if samples else 0.0
    return Difference(
        rel_l2=relative(math.sqrt(square), sketch.norm),
        mean_rel=mean_relative(mean_error * live_numel, sketch.sum_abs, math.prod(sketch.shape)),
        cosine=max(-1.0, min(1.0, cosine_of((square_actual + sketch.norm**2 - square) / 2, norm_actual, sketch.norm))),
        max_abs=float(error[worst]) if worst >= 0 else 0.0,
        worst_index=unravel(at, sketch.shape),
        worst_actual=float(flat[at]),
        worst_expected=worst_expected,
        non_finite=non_finite,
        norm_actual=norm_actual,
        norm_expected=sketch.norm,
        numel=math.prod(sketch.shape),
        estimated=True,
        stray=stray,
        nonzero=sketch.nonzero,
        density=sketch.nonzero / live_numel if live_numel else 0.0,
    )


def same_sketch(one: Sketch, other: Sketch, tolerance: float) -> bool:
    """True where two sketches agree up to `tolerance`, relative to the norm."""
    same = (one.shape, one.seed, one.nonzero) == (other.shape, other.seed, other.nonzero)
    if not same or not np.array_equal(one.sample_index, other.sample_index):
        return False
    limit = tolerance * max(other.norm, 1e-300)
    pairs = [(one.buckets, other.buckets), (one.slice_norms, other.slice_norms), (one.sample_value, other.sample_value)]
    pairs.append((np.sort(np.abs(one.largest_value)), np.sort(np.abs(other.largest_value))))
    # each of the 1024 sums has some thousand elements, so its rounding error is below that of the whole norm
    return all(a.shape == b.shape and bool(np.all(np.abs(a - b) <= limit)) for a, b in pairs)


def _project(values: F64, seed: str, offset: int) -> F64:
    """[1024]: the signed sums of values [n] by the hash of their index; `offset` is the index of the first."""
    key = _key(seed)
    sums = np.zeros(2 * BUCKETS)
    for begin in range(0, values.size, _CHUNK):
        part = values[begin : begin + _CHUNK]
        hashed = hashes(key, part.size, offset + begin)
        # 11 bits: one for the sign, ten for the bucket
        sums += np.bincount((hashed >> np.uint64(53)).astype(np.intp), weights=part, minlength=2 * BUCKETS)
    return sums[:BUCKETS] - sums[BUCKETS:]


def _key(seed: str) -> np.uint64:
    return key_of(f"ktverify sketch {SKETCH_VERSION} {seed}")


def _fp64(tensor: torch.Tensor) -> F64:
    """[n]: the elements of `tensor`, in this thread (see metrics.count_nonzero)."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:
        bits: Any = flat.view(torch.int16).numpy()
        array: Any = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        array = flat.numpy()
    found: F64 = array.astype(np.float64, copy=False)
    return found
