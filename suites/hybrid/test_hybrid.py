"""Experts on another device: slots, scaling, update, moves and waiting forwards, with device "cpu" in a GPU's place."""

from __future__ import annotations

from ktverify.checks.check import Check
from ktverify.pytest_plugin.ask import Ask, each


@each("hybrid")
def test_hybrid(ask: Ask, check: Check) -> None:
    ask(check)
