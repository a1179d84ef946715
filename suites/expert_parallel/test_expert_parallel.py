"""Experts divided among two to four processes: routings, empty ranks, bits of one rank, gradients, saving, loading."""

from __future__ import annotations

from ktverify.checks.check import Check
from ktverify.pytest_plugin.ask import Ask, each


@each("expert_parallel")
def test_expert_parallel(ask: Ask, check: Check) -> None:
    ask(check)
