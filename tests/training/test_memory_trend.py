"""Series of resident memory: leaks of several shapes, and right trainings whose allocator took its time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from ktverify.training.memory_trend import MOST, calm_growth

KIB = 1 << 10
STEPS = 40

# KiB that memory rises in step n
RIGHT: dict[str, Callable[[int], float]] = {
    "flat": lambda n: 0,
    "one block of 8 MiB at step 5": lambda n: 8192 if n == 5 else 0,
    "a block in each early step": lambda n: 900 / (1 + n // 4) if n < 16 else 4,
    "blocks at steps 5, 12 and 20": lambda n: 8192 if n in (5, 12, 20) else 8,
    "a block that comes and goes": lambda n: 2048 if n % 2 else -2048,
    "15 KiB a step": lambda n: 15,
    "a release": lambda n: -3320 if n == 11 else 4,
}
LEAKS: dict[str, Callable[[int], float]] = {
    "256 KiB a step": lambda n: 256,
    "512 KiB every second step": lambda n: 512 * (n % 2),
    "768 KiB every third step": lambda n: 768 * (n % 3 == 0),
    "256 KiB a step, and a release": lambda n: -3320 if n == 11 else 256,
    "256 KiB a step, and a block of 8 MiB": lambda n: 8192 if n == 5 else 256,
    "256 KiB a step, and a block that comes and goes": lambda n: 256 + (2048 if n % 2 else -2048),
}


def series(rise: Callable[[int], float], noise: int = 0) -> list[int]:
    """Bytes after each step, with up to `noise` KiB more or less each."""
    draw = random.Random(noise)
    rises = itertools.accumulate((rise(n) for n in range(STEPS)), initial=400_000)
    return [int((size + draw.uniform(-noise, noise)) * KIB) for size in rises]


@pytest.mark.parametrize("noise", [0, 16, 64])
@pytest.mark.parametrize("name", RIGHT)
def test_an_allocator_that_settles_is_no_leak(name: str, noise: int) -> None:
    assert calm_growth(series(RIGHT[name], noise)) <= MOST


@pytest.mark.parametrize("noise", [0, 16, 64])
@pytest.mark.parametrize("name", LEAKS)
def test_what_repeats_is_a_leak(name: str, noise: int) -> None:
    assert calm_growth(series(LEAKS[name], noise)) > MOST


def test_too_few_steps_show_nothing() -> None:
    assert calm_growth([1, 1, 1]) == float("inf")
