"""Base weights of FP8, INT8, INT4 and MXFP4: the bits of the weights that their codes stand for, refusals, memory."""

from __future__ import annotations

from ktverify.checks.check import Check
from ktverify.checks.isas import Isa
from ktverify.pytest_plugin.ask import Ask, each


@each("quantised")
def test_quantised(ask: Ask, check: Check, isa: Isa) -> None:
    ask(check, isa)


@each("quantised_files")
def test_files(ask: Ask, check: Check) -> None:
    ask(check)


@each("quantised_refusals")
def test_refused(ask: Ask, check: Check) -> None:
    ask(check)


@each("quantised_memory")
def test_memory(ask: Ask, check: Check) -> None:
    ask(check)
