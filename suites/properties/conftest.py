"""The options of this family."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ktverify")
    group.addoption("--case", metavar="TEXT", help="check the properties on this case only: 'E=2,k=1,H=3,…@seed=0'")
    group.addoption("--sizes-of", type=int, metavar="N", help="draw only sizes that are multiples of N: H, I, I / TP")
    group.addoption("--examples", type=int, metavar="N", help="cases drawn for each property and instruction set")
