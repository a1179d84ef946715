"""Forks, threads, memory, the interpreter's lock, and instruction sets chosen by name."""

from __future__ import annotations

from ktverify.checks.check import Check
from ktverify.pytest_plugin.ask import Ask, each


@each("processes", "dropped", "isa_choice")
def test_process(ask: Ask, check: Check) -> None:
    ask(check)
