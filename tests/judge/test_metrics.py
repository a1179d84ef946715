"""Differences of whole tensors, every number by hand, and those estimated from a sketch: rel_l2 within 10 %."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ktverify.judge import metrics
from ktverify.judge.golden_sketch import compare_sketch, make_sketch
from ktverify.judge.metrics import Difference, compare, unravel


def t(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def test_every_number_by_hand() -> None:
    # a - b = (0, 3, -4), |b| = (3, 4, 0): ||a - b|| = 5, ||b|| = 5
    found = compare(t(3, 7, -4), t(3, 4, 0))
    assert found.rel_l2 == 1.0
    assert found.mean_rel == pytest.approx((7 / 3) / (7 / 3 + 1e-8), rel=1e-15)
    assert found.cosine == pytest.approx((9 + 28) / (math.sqrt(9 + 49 + 16) * 5), rel=1e-15)
    assert (found.max_abs, found.worst_index, found.worst_actual, found.worst_expected) == (4.0, (2,), -4.0, 0.0)
    assert (found.norm_actual, found.norm_expected) == (math.sqrt(74), 5.0)
    assert (found.numel, found.nonzero, found.mismatched, found.non_finite) == (3, 2, 2, 0)
    assert not found.estimated


def test_scale_and_sign() -> None:
    b = some(0, 40, 30)
    for a, rel_l2, cosine in ((1.25 * b, 0.25, 1.0), (-b, 2.0, -1.0), (0 * b, 1.0, 0.0)):
        assert compare(a, b).rel_l2 == pytest.approx(rel_l2)
        assert compare(a, b).cosine == pytest.approx(cosine)


def test_the_index_of_the_worst_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK", 7)  # several chunks, the last not full
    b = torch.ones(3, 4, 5, dtype=torch.float64)
    a = b.clone()
    a[2, 1, 3] = 1.5
    a[0, 0, 0] = 1.25
    found = compare(a, b)
    assert found.worst_index == (2, 1, 3)
    assert (found.worst_actual, found.worst_expected, found.max_abs) == (1.5, 1.0, 0.5)
    assert found.rel_l2 == pytest.approx(math.sqrt((0.25 + 0.0625) / 60))
    assert found.mismatched == 2


def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    b = some(1, 5, 11)
    a = (b + 0.01 * some(2, 5, 11)).to(torch.bfloat16)
    whole = compare(a, b)
    monkeypatch.setattr(metrics, "_CHUNK", 3)
    parts = compare(a, b)
    assert parts.rel_l2 == pytest.approx(whole.rel_l2, rel=1e-12)
    assert parts.mean_rel == pytest.approx(whole.mean_rel, rel=1e-12)
    assert (parts.worst_index, parts.mismatched) == (whole.worst_index, whole.mismatched)


def test_an_expected_tensor_of_zeros() -> None:
    same = compare(t(0, 0, -0.0), t(0, 0, 0))
    assert (same.rel_l2, same.mean_rel, same.cosine, same.stray, same.mismatched) == (0.0, 0.0, 1.0, 0, 0)
    other = compare(t(0, 1e-30, 0), t(0, 0, 0))
    assert (other.rel_l2, other.cosine, other.stray, other.density) == (math.inf, 0.0, 1, 0.0)
    assert other.mean_rel == pytest.approx(1e-30 / 3 / 1e-8)


def test_empty_tensors_do_not_differ() -> None:
    empty = compare(torch.zeros(0, 7), torch.zeros(0, 7, dtype=torch.float64))
    assert empty == Difference(0.0, 0.0, 1.0, 0.0, (), 0.0, 0.0, 0, 0.0, 0.0, 0, mismatched=0)


def test_non_finite_elements_are_counted_and_left_out() -> None:
    nan, inf = math.nan, math.inf
    found = compare(t(1, nan, 2, inf, 4, 5), t(1, 1, nan, 4, inf, nan))
    assert (found.non_finite, found.missing_non_finite) == (2, 3)
    assert (found.rel_l2, found.norm_expected, found.worst_index) == (0.0, 1.0, (1,))
    both = compare(t(nan, 2, inf), t(nan, 2, nan))
    assert (both.non_finite, both.missing_non_finite, both.rel_l2) == (0, 0, 0.0)


def test_mismatched_counts_elements_not_rounded_once() -> None:
    b = t(1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -0.0)  # the second and third are ties in bf16: to even
    right = t(1.0, 1.0, 1.0 + 2**-6, 0.0, dtype=torch.bfloat16)
    assert compare(right, b).mismatched == 0
    truncated = t(1.0, 1.0, 1.0 + 2**-7, 0.0, dtype=torch.bfloat16)
    assert compare(truncated, b).mismatched == 1


def test_participation_counts_the_elements_that_carry_the_norm() -> None:
    even = torch.full((4, 5), 3.0)
    assert compare(even, even).participation == pytest.approx(20)
    one = torch.tensor([1e3, 1.0, -1.0, 1.0])
    assert compare(one, one).participation == pytest.approx(1, rel=1e-5)
    assert compare(one * 0, one * 0).participation == math.inf


def test_stray_and_density_are_by_slice() -> None:
    b = torch.zeros(4, 2, 3)
    b[1] = 1.0
    b[3, 0, 0] = 1.0
    a = b.clone()
    assert (compare(a, b).stray, compare(a, b).nonzero) == (0, 7)
    assert compare(a, b).density == pytest.approx(7 / 12)
    a[0, 1, 2] = 1e-9
    a[3, 1, 1] = 1e-9  # in a live slice: not stray
    assert compare(a, b).stray == 1


def test_shapes_are_never_broadcast() -> None:
    with pytest.raises(ValueError, match=r"shape is \[3\], expected \[1, 3\]"):
        compare(torch.zeros(3), torch.zeros(1, 3))


def test_strides_do_not_matter() -> None:
    b = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    assert compare(b.T.contiguous().T, b).rel_l2 == 0.0
    assert compare(b.T.contiguous().T, b + 1).worst_index == (0, 0)


def test_unravel() -> None:
    assert [unravel(n, (2, 3)) for n in range(6)] == [(i, j) for i in range(2) for j in range(3)]


# ---- sketches

SHAPE = (12, 40, 55)


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def single(b: torch.Tensor, seed: int) -> torch.Tensor:
    place = np.unravel_index((seed * 7919) % b.numel(), SHAPE)
    return replaced(b, place, b[place] + 5.0)


def replaced(b: torch.Tensor, place: object, value: object) -> torch.Tensor:
    a = b.clone()
    a[place] = value  # type: ignore[index,assignment]
    return a


def swapped(b: torch.Tensor, seed: int) -> torch.Tensor:
    pair = [seed % 12, (seed + 5) % 12]
    return replaced(b, pair, b[pair[::-1]])


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
        found = compare_sketch(sketch, replaced(b, place, math.nan))
        assert (found.non_finite, found.worst_index) == (1, place)


def test_the_largest_entries_are_kept() -> None:
    b = replaced(some(5), (3, 4, 5), 40.0)
    found = compare_sketch(make_sketch(b, "s"), replaced(b, (3, 4, 5), 39.0))
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
