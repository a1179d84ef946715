"""Every row of the contract's table of refusals: the error, its text, and a layer that works on."""

from __future__ import annotations

from ktverify.checks.check import Check
from ktverify.pytest_plugin.ask import Ask, each


@each("refusals")
def test_refused(ask: Ask, check: Check) -> None:
    ask(check)
