"""Every case on every instruction set: grad_input, six LoRA gradients by name, routing gradient against the oracle."""

from __future__ import annotations

from ktverify.checks.check import Check
from ktverify.checks.isas import Isa
from ktverify.pytest_plugin.ask import Ask


def test_case(ask: Ask, check: Check, isa: Isa) -> None:
    ask.accuracy(check, isa)
