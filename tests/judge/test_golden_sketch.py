"""Sketches of large tensors: rel_l2 within 10 %, and exact for zeros, NaN and the largest elements."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ktverify.judge.golden_sketch import compare_sketch, make_sketch
from ktverify.judge.metrics import compare

SHAPE = (12, 40, 55)


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def replaced(b: torch.Tensor, place: object, value: object) -> torch.Tensor:
    a = b.clone()
    a[place] = value  # type: ignore[index,assignment]
    return a


def swapped(b: torch.Tensor, seed: int) -> torch.Tensor:
    order = list(range(12))
    first, second = seed % 12, (seed + 5) % 12
    order[first], order[second] = second, first
    return b[order]


def single(b: torch.Tensor, seed: int) -> torch.Tensor:
    a = b.clone()
    a.view(-1)[(seed * 7919) % a.numel()] += 5.0
    return a


DIFFERENCES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "dense noise": lambda b, seed: b + 0.003 * some(seed),
    "relative noise": lambda b, seed: b * (1 + 0.004 * some(seed)),
    "rounding to bf16": lambda b, seed: (b * (1 + seed / 1000)).to(torch.bfloat16).double() / (1 + seed / 1000),
    "one expert is wrong": lambda b, seed: replaced(b, seed % 12, some(seed, *SHAPE[1:])),
    "one column is zero": lambda b, seed: replaced(b, (..., seed % 55), 0.0),
    "wrong scale": lambda b, seed: b * (1 + 0.01 * (seed + 1)),
    "two experts are swapped": swapped,
    "one element is wrong": single,
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_rel_l2_is_estimated_within_ten_per_cent(what: str) -> None:
    ratios = []
    for seed in range(60):
        b = some(1000 + seed)
        a = DIFFERENCES[what](b, seed)
        found = compare_sketch(make_sketch(b, f"draw {seed}"), a)
        live = compare(a, b)
        ratios.append(found.rel_l2 / live.rel_l2)
        assert found.estimated
        assert found.norm_actual == pytest.approx(live.norm_actual, rel=1e-12)
        assert found.norm_expected == pytest.approx(live.norm_expected, rel=1e-12)
        assert found.cosine == pytest.approx(live.cosine, abs=0.1 * live.rel_l2**2 + 1e-9)
        assert found.max_abs <= live.max_abs
    assert min(ratios) > 0.9
    assert max(ratios) < 1.1
    # unbiased: 60 draws of 2.2 % standard deviation
    assert float(np.mean(ratios)) == pytest.approx(1, abs=0.012)


def test_a_tensor_does_not_differ_from_its_own_sketch() -> None:
    b = some(1)
    found = compare_sketch(make_sketch(b, "s"), b)
    assert found.rel_l2 < 1e-12
    assert (found.max_abs, found.mean_rel, found.stray, found.non_finite) == (0.0, 0.0, 0, 0)
    assert found.cosine == pytest.approx(1)
    assert (found.nonzero, found.density) == (b.numel(), 1.0)


def test_mean_rel_is_estimated() -> None:
    b = some(2)
    for seed in range(10):
        a = DIFFERENCES["dense noise"](b, seed)
        found = compare_sketch(make_sketch(b, f"draw {seed}"), a)
        assert found.mean_rel == pytest.approx(compare(a, b).mean_rel, rel=0.25)


def test_zero_slices_are_compared_exactly() -> None:
    b = some(3)
    b[[2, 5]] = 0
    sketch = make_sketch(b, "s")
    a = b.clone()
    assert compare_sketch(sketch, a).stray == 0
    a[5, 3, 4] = -1e-12
    found = compare_sketch(sketch, a)
    assert (found.stray, found.worst_index, found.worst_actual, found.worst_expected) == (1, (5, 3, 4), -1e-12, 0.0)
    a[5, 3, 4] = 3.0
    assert compare_sketch(sketch, a).rel_l2 == pytest.approx(3 / float(b.norm()))
    assert found.density == 1.0


def test_a_nan_is_found_at_any_place() -> None:
    b = some(4)
    b[7] = 0
    sketch = make_sketch(b, "s")
    for place in ((0, 0, 0), (7, 39, 54), (11, 20, 33)):
        a = b.clone()
        a[place] = math.nan
        found = compare_sketch(sketch, a)
        assert (found.non_finite, found.worst_index) == (1, place)


def test_the_largest_entries_are_kept() -> None:
    b = some(5)
    b[3, 4, 5] = 40.0
    a = b.clone()
    a[3, 4, 5] = 39.0
    found = compare_sketch(make_sketch(b, "s"), a)
    assert (found.worst_index, found.max_abs, found.worst_expected) == ((3, 4, 5), 1.0, 40.0)


def test_tensors_that_cannot_be_sketched_are_refused() -> None:
    for wrong in (torch.zeros(()), torch.zeros(0, 3), torch.full((2, 2), math.nan, dtype=torch.float64)):
        with pytest.raises(ValueError, match="a sketch takes"):
            make_sketch(wrong, "s")
    with pytest.raises(ValueError, match="expected"):
        compare_sketch(make_sketch(some(6), "s"), some(6).reshape(12, 55, 40))


def test_a_sketch_is_pinned() -> None:
    """The committed goldens depend on its hash, which changes with SKETCH_VERSION only."""
    b = torch.arange(1, 5001, dtype=torch.float64).reshape(5, 1000)
    sketch = make_sketch(b, "pinned")
    assert [float(v) for v in sketch.buckets[:4]] == [863.0, -2483.0, 8838.0, 1304.0]
    assert [int(v) for v in sketch.sample_index[:4]] == [3223, 1942, 611, 1109]
    assert sketch.largest_index.tolist() == list(range(4999, 4967, -1))
