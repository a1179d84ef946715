"""Edge inputs, determinism, isolation, leftovers and dropout, on each instruction set."""

from __future__ import annotations

from ktverify.checks.check import Check
from ktverify.checks.isas import Isa
from ktverify.pytest_plugin.ask import Ask, each


@each("edge")
def test_edge(ask: Ask, check: Check, isa: Isa) -> None:
    ask(check, isa)


@each("behaviour")
def test_behaviour(ask: Ask, check: Check, isa: Isa) -> None:
    ask(check, isa)


@each("dropout")
def test_dropout(ask: Ask, check: Check, isa: Isa) -> None:
    ask(check, isa)


@each("native")
def test_native(ask: Ask, check: Check, isa: Isa) -> None:
    ask(check, isa)
