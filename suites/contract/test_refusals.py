"""Every row of the contract's refusal table: the error, what it says, and a layer that works on."""

from __future__ import annotations

import pytest

from suites.support.child import ChildPool
from suites.support.refusals import REFUSALS
from suites.support.subject import Subject


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(engine: str, children: ChildPool, name: str) -> None:
    children.get().call("suites.support.refusals:check_refusal", subject=Subject(engine), name=name)


def test_out_of_memory(engine: str, children: ChildPool) -> None:
    children.get().call("suites.support.refusals:check_out_of_memory", subject=Subject(engine))
