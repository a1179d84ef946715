"""Every row of the contract's refusal table: the error, what it says, and a layer that works on."""

from __future__ import annotations

import pytest

from ktverify.checks import refusals
from ktverify.checks.refusals import REFUSALS
from ktverify.checks.target import Target
from ktverify.isolation.child import ChildPool


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(engine: str, children: ChildPool, name: str) -> None:
    children.get().call(refusals.check_refusal, target=Target(engine), name=name)


def test_out_of_memory(engine: str, children: ChildPool) -> None:
    children.get().call(refusals.check_out_of_memory, target=Target(engine))
