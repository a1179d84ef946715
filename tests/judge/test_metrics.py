"""Differences: every number against one computed by hand, also for zeros, empty tensors and NaN."""

from __future__ import annotations

import math

import pytest
import torch

from ktverify.judge import metrics
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
    b = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert compare(1.25 * b, b).rel_l2 == pytest.approx(0.25)
    assert compare(1.25 * b, b).cosine == pytest.approx(1.0)
    assert compare(-b, b).rel_l2 == pytest.approx(2.0)
    assert compare(-b, b).cosine == pytest.approx(-1.0)
    assert compare(torch.zeros_like(b), b).rel_l2 == 1.0
    assert compare(torch.zeros_like(b), b).cosine == 0.0


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
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(5, 11, dtype=torch.float64, generator=generator)
    a = (b + 0.01 * torch.randn(5, 11, dtype=torch.float64, generator=generator)).to(torch.bfloat16)
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
