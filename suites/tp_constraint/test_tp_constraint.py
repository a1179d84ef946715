"""Tensor-parallel degrees that do not divide the intermediate size are refused, with those that would work."""

from __future__ import annotations

import pytest

from ktverify.checks import tensor_parallel
from ktverify.checks.target import Target
from ktverify.isolation.child import ChildPool

# moe_intermediate_size -> degrees tried: primes, powers of two and their neighbours, the sizes of real models
DEGREES = {
    2049: (1, 2, 3, 4, 8),
    2048: (1, 2, 3, 4, 5, 6, 8),
    1408: (2, 3, 4, 8, 11),
    768: (2, 3, 4, 5, 7),
    14336: (2, 3, 4, 7, 8),
    47: (1, 2, 47),
    48: (5, 7, 9, 12),
    1: (1, 2),
    6: (1, 2, 3, 4, 6, 12),
}
PAIRS = [(intermediate, degree) for intermediate, degrees in DEGREES.items() for degree in degrees]


@pytest.fixture
def target(engine: str) -> Target:
    # the refusal comes before anything that depends on the instruction set
    return Target(engine)


@pytest.mark.parametrize(("intermediate", "degree"), PAIRS)
def test_degree(children: ChildPool, target: Target, intermediate: int, degree: int) -> None:
    children.get().call(tensor_parallel.check_degree, target=target, intermediate=intermediate, degree=degree)


@pytest.mark.parametrize("degree", [0, -1, -4])
def test_no_degree_at_all(children: ChildPool, target: Target, degree: int) -> None:
    children.get().call(tensor_parallel.check_bad_degree, target=target, degree=degree)
