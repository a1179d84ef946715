"""Tensor parallel degrees that do not divide the intermediate size are refused, with those that would work."""

from __future__ import annotations

from ktverify.checks.check import Check
from ktverify.pytest_plugin.ask import Ask, each


@each("tp_constraint")
def test_degree(ask: Ask, check: Check) -> None:
    ask(check)
